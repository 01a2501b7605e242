"""FVU of several transcoders at one L0, on the same rows, with intervals of the differences.

Each transcoder's thresholds are moved by common factors; between two neighbouring points of its L0-FVU curve the FVU is
interpolated linearly in log L0. Outside the curve there is no number: extrapolating a sparsity curve is guessing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from ...measures.activations import active_latents, base_output, group_counts, group_sums
from ...measures.curve import scale_levels
from ...measures.strata import StrataSums
from ...rows.batches import RowBatch, documents_of, input_and_target


@dataclass
class DocumentCurve:
    """The full-width L0-FVU curve of one transcoder as sums over each document; a column a factor."""

    transcoder: Transcoder
    scales: tuple[float, ...]
    documents: Tensor
    """[documents] int64, ascending"""
    sums: StrataSums

    @classmethod
    def empty(
        cls,
        transcoder: Transcoder,
        scales: tuple[float, ...],
        shards: ShardSet,
        split: str = "val",
        limit: int | None = None,
    ) -> DocumentCurve:
        """No rows yet; `scales` descend, `limit` as in `row_batches`."""
        documents = documents_of(shards.split(split), limit)
        return cls(transcoder, scales, documents, StrataSums(len(documents), len(scales), shards.d_out))

    def add(self, batch: RowBatch, shards: ShardSet) -> None:
        """Measure one batch with every factor; each activation is decoded once."""
        transcoder = self.transcoder
        x, y = input_and_target(transcoder, shards, batch)
        active = active_latents(transcoder, x, transcoder.threshold.clamp_min(0) * self.scales[-1])
        level = scale_levels(active, transcoder.threshold, self.scales)
        y_hat, l0 = base_output(transcoder, x).clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        sq_errs, l0s = [], []
        for index in range(len(self.scales)):
            new = active.where(level == index)
            counts = group_counts(transcoder, new)
            y_hat += group_sums(transcoder, new, counts).sum(1)
            l0 += counts.sum(1)
            sq_errs.append((y_hat - y).square().sum(1))
            l0s.append(l0.clone())
        self.sums.add(
            torch.searchsorted(self.documents, batch.doc_ids.long()), y, torch.stack(sq_errs), torch.stack(l0s)
        )

    def points(self) -> tuple[Float[Tensor, " scales"], Float[Tensor, " scales"]]:
        """(L0, FVU) at each factor, over all rows."""
        sums = self.sums
        return sums.l0.sum(0) / sums.n_rows.sum(), sums.sq_err.sum(0) / sums.variance().sum()


def fvu_at(l0: Float[Tensor, "draws scales"], fvu: Float[Tensor, "draws scales"], target: float) -> Tensor:
    """[draws] FVU at L0 = `target`, linear in log L0 between neighbouring points; NaN where the curve does not reach.

    `l0` ascends along a row (thresholds fall).
    """
    right = torch.searchsorted(l0.contiguous(), torch.full((len(l0), 1), target, dtype=l0.dtype)).squeeze(1)
    inside = (right < l0.shape[1]) & (l0[:, 0] <= target)
    right = right.clamp(1, l0.shape[1] - 1)
    rows = torch.arange(len(l0))
    low, high = l0[rows, right - 1].log(), l0[rows, right].log()
    # A point at L0 = 0 has no logarithm: nothing is interpolated from it.
    between = inside & low.isfinite() & (high > low)
    share = torch.where(between, (torch.tensor(target).double().log() - low) / (high - low), 0.0)
    value = fvu[rows, right - 1] * (1 - share) + fvu[rows, right] * share
    exact, first = l0[rows, right] == target, l0[:, 0] == target
    value = torch.where(exact, fvu[rows, right], value)
    value = torch.where(first, fvu[:, 0], value)
    return torch.where(between | exact | first, value, float("nan"))
