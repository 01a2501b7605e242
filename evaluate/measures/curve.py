"""The L0-FVU curve: the same weights with every threshold moved by a factor, so that transcoders meet at equal L0.

Moving the threshold changes which activations pass, not their values, so a lower threshold only adds to a higher one:
the activations between two neighbouring ones are decoded once and summed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from matryoshka.metrics import FvuSums, L0Sums
from matryoshka.transcoder import Transcoder

from ..result import finite
from .activations import SparseActs, group_counts, group_sums, rows_at_once
from .reconstruction import TargetMoments
from .records import CurvePoint


@dataclass
class CurveSums:
    """Sums of FVU and L0 for each factor on the threshold, the largest factor first."""

    scales: tuple[float, ...]
    fvu: list[FvuSums] = field(init=False)
    l0: list[L0Sums] = field(init=False)

    def __post_init__(self) -> None:
        assert list(self.scales) == sorted(set(self.scales), reverse=True)
        self.fvu = [FvuSums() for _ in self.scales]
        self.l0 = [L0Sums() for _ in self.scales]

    def add(self, transcoder: Transcoder, active: SparseActs, base: Tensor, y: Tensor) -> None:
        """Add a batch. `active` holds at least all activations above the smallest factor times the threshold."""
        moments = TargetMoments.of(y)
        size = rows_at_once(transcoder, active.n_rows)
        columns: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.scales]
        for part, base_part, y_part in zip(active.split(size), base.split(size), y.split(size), strict=True):
            for column, found in zip(columns, self._errors(transcoder, part, base_part, y_part), strict=True):
                column.append(found)
        for index, column in enumerate(columns):
            sq_err, l0 = (torch.cat(parts, 1) for parts in zip(*column, strict=True))
            self.fvu[index].merge(moments.fvu(sq_err))
            self.l0[index].add(l0)

    def _errors(
        self, transcoder: Transcoder, active: SparseActs, base: Tensor, y: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(squared errors [n_prefixes, rows], L0 int64) at each factor."""
        n_prefixes = len(transcoder.prefix_ends)
        residual = (base - y)[:, None].repeat(1, n_prefixes, 1)
        counts = torch.zeros(len(y), n_prefixes, dtype=torch.int64, device=y.device)
        level = scale_levels(active, transcoder.threshold, self.scales)
        for index in range(len(self.scales)):
            new = active.where(level == index)
            new_counts = group_counts(transcoder, new)
            counts += new_counts
            per_group = group_sums(transcoder, new, new_counts)
            for group in range(1, n_prefixes):
                per_group[:, group] += per_group[:, group - 1]
            residual += per_group
            yield residual.norm(dim=2).square().T, counts.cumsum(1).T

    def value(self) -> tuple[CurvePoint, ...]:
        """The points, sparsest first; none when no row was added."""
        return tuple(
            CurvePoint(threshold_scale=scale, l0=tuple(l0.value()), fvu=tuple(finite(value) for value in fvu.value()))
            for scale, fvu, l0 in zip(self.scales, self.fvu, self.l0, strict=True)
            if fvu.n_rows > 0
        )


def scale_levels(active: SparseActs, threshold: Tensor, scales: tuple[float, ...]) -> Tensor:
    """[n_active] int64: the first of the descending `scales` at which an activation passes; len(scales) if none."""
    cut = threshold.clamp_min(0)[active.latent]
    passes = torch.stack([active.value > scale * cut for scale in scales])
    return (~passes).sum(0)
