"""From sums over contexts to losses, the recovered share and its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bootstrap import central
from .faithfulness_file import Interval

ZERO, MEAN = "zero", "mean"
_Number = Callable[[Mapping[str, Tensor]], Tensor]


def columns(prefix_ends: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the sums that are kept of each context."""
    of_variants = [f"{variant}.{what}" for variant in (ZERO, MEAN) for what in ("ce", "kl", "top1")]
    of_prefixes = [f"{end}.{what}" for end in prefix_ends for what in ("ce", "kl", "top1", "l0")]
    return ("n", "clean.ce", *of_variants, *of_prefixes)


def mean_of(name: str) -> _Number:
    """The mean over positions of one column."""
    return lambda sums: sums[name] / sums["n"]


def increase(variant: str) -> _Number:
    """ce_loss of a variant - ce_loss_clean."""
    return lambda sums: (sums[f"{variant}.ce"] - sums["clean.ce"]) / sums["n"]


def recovered(variant: str, ablation: str) -> _Number:
    """(ablated - spliced) / (ablated - clean), the score of SAEBench's core evaluation (Karvonen et al. 2025, 3.1).

    NaN where the ablation does not raise the loss: then there is nothing to recover.
    """

    def share(sums: Mapping[str, Tensor]) -> Tensor:
        harm = sums[f"{ablation}.ce"] - sums["clean.ce"]
        return torch.where(harm > 0, (sums[f"{ablation}.ce"] - sums[f"{variant}.ce"]) / harm, torch.nan)

    return share


@dataclass(frozen=True)
class Estimates:
    """Numbers over all contexts, and over draws of contexts with replacement."""

    totals: dict[str, Tensor]
    """column -> sum, a float64 scalar"""
    draws: dict[str, Tensor] | None
    """column -> float64 [n_draws]; None without an interval"""
    n_contexts: int

    @classmethod
    def of(cls, sums: Mapping[str, Tensor], n_draws: int, seed: int) -> Estimates:
        """Sum `sums` (column -> [contexts]), and draw as many contexts again `n_draws` times.

        No draws with fewer than two contexts that have scored positions (Efron & Tibshirani 1993, chapter 13).
        """
        used = sums["n"] > 0
        totals = {name: column.sum() for name, column in sums.items()}
        n_used = int(used.sum())
        if n_used < 2 or n_draws == 0:
            return cls(totals, None, len(used))
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(n_used, (n_used,), generator=generator) for _ in range(n_draws)]
        weights = torch.stack([torch.bincount(one, minlength=n_used) for one in drawn]).double()
        return cls(totals, {name: weights @ column[used] for name, column in sums.items()}, len(used))

    def value(self, number: _Number) -> float:
        """A number over all contexts; NaN where it is not defined."""
        return float(number(self.totals))

    def interval(self, number: _Number) -> Interval | None:
        """Its central 95%; None without draws, or where it is not defined in all of them."""
        if self.draws is None:
            return None
        values = number(self.draws)
        return central(values[:, None])[0] if bool(values.isfinite().all()) else None
