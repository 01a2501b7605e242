"""Everything that one pass over the val rows sums up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from ...config import EvaluateConfig
from ...measures.activations import SparseActs, active_latents, base_output, group_counts, group_sums, rows_at_once
from ...measures.breakdown import Breakdown
from ...measures.curve import CurveSums
from ...measures.reconstruction import ReconstructionSums, RowErrors, TargetMoments, joined, replaced, row_errors
from ...rows.batches import RowBatch, count_rows, input_and_target
from .batch_topk import CANDIDATE_SCALE, swapped, topk_among, topk_of_all
from .latents import LatentSums

MAX_CURVE_STEP = 16
"""However many rows there are, the curve is drawn from every sixteenth at least: that costs next to nothing."""


@dataclass(frozen=True, slots=True)
class _TopK:
    """BatchTopK's choice in a batch."""

    counts: Tensor
    """[rows, n_groups] int64: how many are active"""
    changes: SparseActs
    """What makes the threshold mode's sums into those of this choice; the whole choice when not `is_change`."""
    is_change: bool


class Measurement:
    """Threshold mode, BatchTopK mode, the curve, the breakdown and the latents, from one encoder product a batch.

    `with_topk` is False for a transcoder that has no k of its own.
    """

    SUMS = ("n_rows", "threshold", "batch_topk", "curve", "breakdown", "latents", "_smallest_choice", "l0_histogram")

    def __init__(
        self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig, *, with_topk: bool = True
    ) -> None:
        n_prefixes = len(transcoder.prefix_ends)
        self._transcoder, self._shards, self._config = transcoder, shards, config
        self.n_rows = 0
        # Every n-th row, not the first ones: in the order of the disk those are the first positions of all contexts.
        n_rows, n_curve = count_rows(shards, config.split, config.tokens), config.curve_tokens
        self._curve_step = 0 if n_curve == 0 else min(max(1, -(-n_rows // n_curve)), MAX_CURVE_STEP)
        self.threshold = ReconstructionSums()
        self.batch_topk = ReconstructionSums() if with_topk and transcoder.config.k is not None else None
        self.curve = CurveSums(config.curve_scales)
        self.breakdown = Breakdown(shards, n_prefixes, config.split, config.tokens)
        self.latents = LatentSums(transcoder.config.d_sae)
        self._smallest_choice: float | None = None
        self.l0_histogram = torch.zeros(n_prefixes, 0, dtype=torch.int64)
        """[n_prefixes, values] rows that have each number of active latents."""

    def add(self, batch: RowBatch) -> None:
        """Measure one batch."""
        transcoder = self._transcoder
        x, y = input_and_target(transcoder, self._shards, batch)
        floor = self._floor()
        candidates = active_latents(transcoder, x, floor)
        passes = candidates.value > transcoder.threshold.clamp_min(0)[candidates.latent]
        active, base, moments = candidates.where(passes), base_output(transcoder, x), TargetMoments.of(y)
        top = None if self.batch_topk is None else self._topk(x, candidates, passes, floor)
        errors, topk_errors = self._errors(base, y, active, top)
        self.threshold.add_moments(moments, errors)
        self.breakdown.add(batch, y, errors.sq_err, errors.l0)
        self.latents.add(active)
        self._count_l0(errors.l0)
        if self.batch_topk is not None and topk_errors is not None:
            self.batch_topk.add_moments(moments, topk_errors)
        if self._curve_step > 0:
            first = -self.n_rows % self._curve_step
            rows = slice(first, None, self._curve_step)
            if first < len(batch):
                self.curve.add(transcoder, candidates.every(first, self._curve_step), base[rows], y[rows])
        self.n_rows += len(batch)

    def _topk(self, x: Tensor, candidates: SparseActs, passes: Tensor, floor: Tensor) -> _TopK:
        """What BatchTopK chooses in one batch."""
        assert self._transcoder.config.k is not None
        n = self._transcoder.config.k * len(x)
        chosen = topk_among(candidates, n, floor)
        if chosen is None:
            top = topk_of_all(self._transcoder, x, n)
            changes, is_change = top, False
        else:
            top = candidates.where(chosen)
            # Most activations are in both modes: only those of one are decoded again.
            changes, is_change = swapped(candidates, passes, chosen), True
        self._smallest_choice = float(top.value.min()) if len(top.value) > 0 else 0.0
        return _TopK(group_counts(self._transcoder, top), changes, is_change)

    def _errors(
        self, base: Tensor, y: Tensor, active: SparseActs, top: _TopK | None
    ) -> tuple[RowErrors, RowErrors | None]:
        """Errors in threshold mode and in BatchTopK mode."""
        transcoder, found, topk_found = self._transcoder, [], []
        counts, size = group_counts(transcoder, active), rows_at_once(transcoder, len(y))
        changes = [None] * -(-len(y) // size) if top is None else top.changes.split(size)
        for index, (part, changed) in enumerate(zip(active.split(size), changes, strict=True)):
            rows = slice(index * size, (index + 1) * size)
            per_group = group_sums(transcoder, part, counts[rows])
            errors = row_errors(base[rows], per_group, counts[rows], y[rows])
            found.append(errors)
            if top is None or changed is None:
                continue
            if not top.is_change:
                errors, per_group = None, None
            topk_found.append(self._changed(errors, per_group, changed, base[rows], top.counts[rows], y[rows]))
        return joined(found), joined(topk_found) if topk_found else None

    def _changed(
        self,
        errors: RowErrors | None,
        per_group: Tensor | None,
        changed: SparseActs,
        base: Tensor,
        counts: Tensor,
        y: Tensor,
    ) -> RowErrors:
        """`errors`, which `per_group` came to, with `changed` added; only the rows where something changes are measured
        again. Without `errors` all of them are, and `changed` is everything."""
        transcoder = self._transcoder
        if errors is None or per_group is None:
            return row_errors(base, group_sums(transcoder, changed, counts), counts, y)
        rows, index = changed.row.unique_consecutive(return_inverse=True)
        added = SparseActs(len(rows), index, changed.latent, changed.value)
        new = row_errors(
            base.index_select(0, rows),
            per_group.index_select(0, rows).add_(group_sums(transcoder, added, group_counts(transcoder, added))),
            counts.index_select(0, rows),
            y.index_select(0, rows),
        )
        return replaced(errors, rows, new)

    def _floor(self) -> Tensor:
        """[d_sae]: how far below the threshold activations are wanted."""
        scale = min(self._config.curve_scales) if self._curve_step > 0 else 1.0
        if self.batch_topk is not None and self._smallest_choice is None:
            # Nothing is known of BatchTopK's cut yet; a calibrated threshold is about there.
            scale = min(scale, CANDIDATE_SCALE)
        floor = self._transcoder.threshold.clamp_min(0) * min(scale, 1.0)
        if self.batch_topk is not None and self._smallest_choice is not None:
            floor = floor.clamp_max(CANDIDATE_SCALE * self._smallest_choice)
        return floor

    def _count_l0(self, l0: Tensor) -> None:
        l0 = l0.cpu()
        n_values = max(self.l0_histogram.shape[1], int(l0.max()) + 1)
        counted = torch.stack([torch.bincount(row, minlength=n_values) for row in l0])
        counted[:, : self.l0_histogram.shape[1]] += self.l0_histogram
        self.l0_histogram = counted
