"""How each latent is used, and the summary of each group: dead, dense, redundant, spread of firing densities."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from matryoshka.metrics import FiringCounts

from ...measures.activations import SparseActs
from ...measures.records import GroupLatents
from ...measures.redundancy import REDUNDANT, Neighbours
from ...result import finite

DENSE = 0.1
"""A latent that fires on more than this share of rows is dense."""
LOG10_DENSITY_EDGES = tuple(-8 + 0.5 * i for i in range(17))
"""Bins of log10 density: half a decade each, from -8 to 0."""


@dataclass
class LatentSums:
    """How often each latent fires, and how strongly when it does. On the CPU, where sums have one order."""

    d_sae: int
    firing: FiringCounts = field(init=False)
    total: Tensor = field(init=False)
    """[d_sae] float64 sum of activations"""
    largest: Tensor = field(init=False)
    """[d_sae] float32 largest activation; 0 where it never fired"""

    def __post_init__(self) -> None:
        self.firing = FiringCounts(self.d_sae)
        self.total = torch.zeros(self.d_sae, dtype=torch.float64)
        self.largest = torch.zeros(self.d_sae)

    def add(self, active: SparseActs) -> None:
        """Add the activations of a batch."""
        latent, value = active.latent.cpu(), active.value.float().cpu()
        self.firing.add_active(latent, active.n_rows)
        self.total += torch.bincount(latent, weights=value.double(), minlength=self.d_sae)
        self.largest.scatter_reduce_(0, latent, value, "amax")

    def mean_when_active(self) -> Tensor:
        """[d_sae] float64 mean activation over the rows where it fires; NaN where it never does."""
        return self.total / self.firing.counts


def group_latents(
    firing: FiringCounts, neighbours: Neighbours, group_sizes: tuple[int, ...]
) -> tuple[GroupLatents, ...]:
    """The own latents of each group."""
    groups, start = [], 0
    for size in group_sizes:
        groups.append(latent_range(firing, neighbours, start, start + size))
        start += size
    return tuple(groups)


def latent_range(firing: FiringCounts, neighbours: Neighbours, start: int, end: int) -> GroupLatents:
    """The latents [start, end): dead is "fired on no row that was evaluated"."""
    density, cosine = firing.density()[start:end], neighbours.cosine[start:end].double()
    return GroupLatents(
        n_latents=end - start,
        n_dead=int((density == 0).sum()),
        dead_share=firing.dead_share(start, end),
        dense_share=float((density > DENSE).double().mean()),
        mean_max_cosine=finite(float(cosine.mean())),
        redundant_share=finite(float(torch.where(cosine.isnan(), cosine, (cosine > REDUNDANT).double()).mean())),
        log10_density_counts=_histogram(density[density > 0]),
    )


def _histogram(density: Tensor) -> tuple[int, ...]:
    """Counts per bin [edge_i, edge_i+1); values below the first edge or at 1.0 count in the outermost bins."""
    edges = torch.tensor(LOG10_DENSITY_EDGES[1:-1], dtype=torch.float64)
    bins = torch.bucketize(density.log10(), edges, right=True)
    return tuple(torch.bincount(bins, minlength=len(LOG10_DENSITY_EDGES) - 1).tolist())
