"""Everything that one pass over the val rows sums up."""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshka.shards import ShardSet
from matryoshka.sites import apply_convention
from matryoshka.transcoder import Transcoder

from .active import Active, active_latents, base_output, group_counts, group_sums
from .batch_topk import CANDIDATE_SCALE, swapped, topk_among, topk_of_all
from .breakdown import Breakdown
from .config import EvaluateConfig
from .curve import CurveSums
from .latents import LatentSums
from .reconstruction import ReconstructionSums, RowErrors, row_errors
from .rows import RowBatch


class Measurement:
    """Threshold mode, BatchTopK mode, the curve, the breakdown and the latents, from one encoder product a batch.

    `with_topk` is False for a transcoder that has no k of its own.
    """

    def __init__(
        self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig, *, with_topk: bool = True
    ) -> None:
        n_prefixes = len(transcoder.prefix_ends)
        self._transcoder, self._shards, self._config = transcoder, shards, config
        self.n_rows = 0
        self.threshold = ReconstructionSums()
        self.batch_topk = ReconstructionSums() if with_topk else None
        self.curve = CurveSums(config.curve_scales)
        self.breakdown = Breakdown(shards, n_prefixes)
        self.latents = LatentSums(transcoder.config.d_sae)
        self._smallest_choice: float | None = None
        self.l0_histogram = torch.zeros(n_prefixes, 0, dtype=torch.int64)
        """[n_prefixes, values] rows that have each number of active latents."""

    def add(self, batch: RowBatch) -> None:
        """Measure one batch."""
        transcoder = self._transcoder
        y = batch.target.to(transcoder.device).float()
        x = apply_convention(
            batch.source.to(transcoder.device),
            transcoder.config.input,
            source_site=self._shards.manifest.source.site,
            norm=self._shards.norm,
        )
        draw_curve = self.n_rows < self._config.curve_tokens
        self.n_rows += len(batch)
        floor = self._floor(draw_curve)
        candidates = active_latents(transcoder, x, floor)
        passes = candidates.value > transcoder.threshold.clamp_min(0)[candidates.latent]
        active = candidates.where(passes)
        base, counts = base_output(transcoder, x), group_counts(transcoder, active)
        per_group = group_sums(transcoder, active, counts)
        errors = row_errors(base, per_group, counts, y)
        self.threshold.add(y, errors)
        self.breakdown.add(batch, y, errors.sq_err, errors.l0)
        self.latents.add(active)
        self._count_l0(errors.l0)
        if self.batch_topk is not None:
            self.batch_topk.add(y, self._topk_errors(x, y, base, per_group, candidates, passes, floor))
        if draw_curve:
            self.curve.add(transcoder, candidates, base, y)

    def _topk_errors(
        self,
        x: Tensor,
        y: Tensor,
        base: Tensor,
        per_group: Tensor,
        candidates: Active,
        passes: Tensor,
        floor: Tensor,
    ) -> RowErrors:
        """BatchTopK mode of one batch, from what the threshold mode has decoded; `per_group` is overwritten."""
        transcoder = self._transcoder
        n = transcoder.config.k * len(x)
        chosen = topk_among(candidates, n, floor)
        if chosen is None:
            top = topk_of_all(transcoder, x, n)
            per_group = group_sums(transcoder, top, group_counts(transcoder, top))
        else:
            top = candidates.where(chosen)
            # Most activations are in both modes: only those of one are decoded again.
            changes = swapped(candidates, passes, chosen)
            per_group += group_sums(transcoder, changes, group_counts(transcoder, changes))
        self._smallest_choice = float(top.value.min()) if len(top.value) > 0 else 0.0
        return row_errors(base, per_group, group_counts(transcoder, top), y)

    def _floor(self, draw_curve: bool) -> Tensor:
        """[d_sae]: how far below the threshold activations are wanted."""
        scale = min(self._config.curve_scales) if draw_curve else 1.0
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
