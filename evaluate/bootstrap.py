"""Confidence intervals by drawing contexts with replacement: rows of one context are not independent of each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .strata import StrataSums

LEVEL = 0.95
_DRAWS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Intervals:
    """The central 95% of the resampled values, (low, high) of each prefix."""

    fvu: tuple[tuple[float, float], ...]
    l0: tuple[tuple[float, float], ...]


def bootstrap_intervals(contexts: StrataSums, n_draws: int, seed: int) -> Intervals | None:
    """Percentile intervals of FVU and L0 (Efron & Tibshirani 1993, chapter 13).

    Each of `n_draws` draws takes as many contexts as there are, with replacement, and divides the summed squared errors
    by the summed variance. That is about the mean of ALL rows: about the draw's own mean it would be smaller by the
    spread between contexts / n_contexts, and every interval shifted upwards. None with fewer than two contexts or no
    draws.
    """
    if int((contexts.n_rows > 0).sum()) < 2 or n_draws == 0:
        return None
    fvu, l0 = resample(contexts, n_draws, seed)
    return Intervals(fvu=central(fvu), l0=central(l0))


def resample(contexts: StrataSums, n_draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """FVU and L0 of each draw, float64 [n_draws, n_prefixes]; equal seeds draw equal contexts, so draws pair."""
    used, variance = contexts.n_rows > 0, contexts.variance()
    generator = torch.Generator().manual_seed(seed)
    fvu, l0 = [], []
    for start in range(0, n_draws, _DRAWS_AT_ONCE):
        weights = _weights(min(_DRAWS_AT_ONCE, n_draws - start), int(used.sum()), generator)
        fvu.append(weights @ contexts.sq_err[used] / (weights @ variance[used])[:, None])
        l0.append(weights @ contexts.l0[used] / (weights @ contexts.n_rows[used])[:, None])
    return torch.cat(fvu), torch.cat(l0)


def central(values: Tensor) -> tuple[tuple[float, float], ...]:
    """(low, high) of the central share LEVEL of each column of `values` [n_draws, columns]."""
    tail = (1 - LEVEL) / 2
    bounds = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return tuple((float(low), float(high)) for low, high in bounds.T)


def _weights(n_draws: int, n_contexts: int, generator: torch.Generator) -> Tensor:
    """How often each context is drawn, float64 [n_draws, n_contexts]."""
    drawn = torch.randint(n_contexts, (n_draws, n_contexts), generator=generator)
    weights = torch.zeros(n_draws, n_contexts, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))
