"""From sums over documents to losses, the recovered share and its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .bootstrap import Interval, central, resampled

ZERO, MEAN = "zero", "mean"
_Number = Callable[[Mapping[str, Tensor]], Tensor]


def columns(prefix_ends: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the sums that are kept of each document."""
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


@dataclass
class DocumentSums:
    """Sums over the scored positions of each document; it grows with the documents that are seen.

    A document may be in several contexts and batches.
    """

    documents: Int[Tensor, " documents"]
    """int64, ascending"""
    rows: Float[Tensor, "documents columns"]
    """float64"""

    @classmethod
    def empty(cls, n_columns: int) -> DocumentSums:
        """Of no document."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, n_columns, dtype=torch.float64))

    def add(self, documents: Int[Tensor, " some"], rows: Float[Tensor, "some columns"]) -> None:
        """Add the sums of some positions of `documents`."""
        self.documents, index = torch.cat([self.documents, documents]).unique(return_inverse=True)
        sums = torch.zeros(len(self.documents), rows.shape[1], dtype=torch.float64)
        self.rows = sums.index_add_(0, index, torch.cat([self.rows, rows]))


@dataclass(frozen=True)
class Estimates:
    """Numbers over all documents, and over draws of documents with replacement."""

    totals: dict[str, Tensor]
    """column -> sum, a float64 scalar"""
    draws: dict[str, Tensor] | None
    """column -> float64 [n_draws]; None without an interval"""
    n_documents: int

    @classmethod
    def of(cls, sums: Mapping[str, Tensor], n_draws: int, seed: int) -> Estimates:
        """Sum `sums` (column -> [documents]), and draw as many documents as have scored positions `n_draws` times."""
        used = sums["n"] > 0
        totals = {name: column.sum() for name, column in sums.items()}
        columns = torch.stack([column[used] for column in sums.values()], 1)
        drawn = resampled(columns, n_draws, torch.Generator().manual_seed(seed))
        draws = None if drawn is None else dict(zip(sums, drawn.T, strict=True))
        return cls(totals, draws, int(used.sum()))

    def value(self, number: _Number) -> float:
        """A number over all documents; NaN where it is not defined."""
        return float(number(self.totals))

    def interval(self, number: _Number) -> Interval | None:
        """Its central 95%; None without draws, or where it is not defined in all of them."""
        if self.draws is None:
            return None
        values = number(self.draws)
        return central(values[:, None])[0] if bool(values.isfinite().all()) else None
