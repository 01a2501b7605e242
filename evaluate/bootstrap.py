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

    Each of `n_draws` draws takes as many contexts as there are, with replacement, and computes the numbers from the
    summed sums, the mean of y and so the variance included. None with fewer than two contexts or no draws.
    """
    used = contexts.n_rows > 0
    n_contexts = int(used.sum())
    if n_contexts < 2 or n_draws == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    fvu, l0 = [], []
    for start in range(0, n_draws, _DRAWS_AT_ONCE):
        weights = _weights(min(_DRAWS_AT_ONCE, n_draws - start), n_contexts, generator)
        n_rows = weights @ contexts.n_rows[used]
        variance = weights @ contexts.sum_y_sq[used] - (weights @ contexts.sum_y[used]).square().sum(1) / n_rows
        fvu.append(weights @ contexts.sq_err[used] / variance[:, None])
        l0.append(weights @ contexts.l0[used] / n_rows[:, None])
    return Intervals(fvu=_central(torch.cat(fvu)), l0=_central(torch.cat(l0)))


def _weights(n_draws: int, n_contexts: int, generator: torch.Generator) -> Tensor:
    """How often each context is drawn, float64 [n_draws, n_contexts]."""
    drawn = torch.randint(n_contexts, (n_draws, n_contexts), generator=generator)
    weights = torch.zeros(n_draws, n_contexts, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def _central(values: Tensor) -> tuple[tuple[float, float], ...]:
    tail = (1 - LEVEL) / 2
    bounds = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return tuple((float(low), float(high)) for low, high in bounds.T)
