"""Which latents fire together, and which imply which.

With N rows, n_i rows on which latent i fires and n_ij on which both fire:

    P(j | i)   = n_ij / n_i
    lift_ij    = n_ij N / (n_i n_j)                    1 where the two are independent
    jaccard_ij = n_ij / (n_i + n_j - n_ij)
    phi_ij     = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))        Pearson correlation of firing or not

An edge leads from a parent in an earlier group to a child in a later one: the broad latents come first, and a child
that fires only where its parent does is a finer cut of it. Of parents that imply equally much the rarer one comes
first, whose lift is larger.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import HierarchyConfig
from ...measures.pair_sums import PairBlock

_CELLS_AT_ONCE = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Edges:
    """Parent/child edges, ordered by child and then from the best parent down."""

    parent: Tensor
    """[n_edges] int64"""
    child: Tensor
    """[n_edges] int64"""
    n_both: Tensor
    """[n_edges] int64 rows on which both fire"""


@dataclass(frozen=True, slots=True)
class Partners:
    """Latents that fire with each latent, ordered by latent and then by falling phi."""

    latent: Tensor
    """[n] int64"""
    other: Tensor
    """[n] int64"""
    rank: Tensor
    """[n] int64, from 1"""
    n_both: Tensor
    """[n] int64"""
    phi: Tensor
    """[n] float64"""


@dataclass(frozen=True, slots=True)
class Cofiring:
    """What the counts of pairs come to."""

    edges: Edges
    partners: Partners
    best: Tensor
    """[n_groups, d_sae] float64: largest P(parent | child) over the parents in that group; 0 where there is none, and
    in the child's own group and later ones"""


def cofiring(
    blocks: Iterable[PairBlock], counts: Tensor, n_rows: int, group_sizes: tuple[int, ...], config: HierarchyConfig
) -> Cofiring:
    """Reduce blocks of pair counts, in their order; `counts` [d_sae] int64 is how often each latent fires."""
    group = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    edges, partners, best = [], [], []
    for block in blocks:
        step = max(1, _CELLS_AT_ONCE // len(counts))
        for start in range(0, len(block.sums), step):
            both = block.sums[start : start + step]
            latent = torch.arange(len(both)) + block.start + start
            edges.append(_parents(both, latent, counts, n_rows, group, config))
            partners.append(_partners(both, latent, counts, n_rows, config))
            best.append(_best(both, latent, counts, n_rows, group, config))
    parent, child, n_both = (torch.cat(column) for column in zip(*edges, strict=True))
    return Cofiring(
        edges=Edges(parent, child, n_both),
        partners=Partners(*(torch.cat(column) for column in zip(*partners, strict=True))),
        best=torch.cat(best, 1),
    )


def lift(n_both: Tensor, n_one: Tensor, n_other: Tensor, n_rows: int) -> Tensor:
    """n_ij N / (n_i n_j), float64; NaN where one of the two never fires."""
    return n_both.double() * n_rows / (n_one.double() * n_other.double())


def jaccard(n_both: Tensor, n_one: Tensor, n_other: Tensor) -> Tensor:
    """n_ij / (n_i + n_j - n_ij), float64; NaN where neither ever fires."""
    return n_both.double() / (n_one + n_other - n_both).double()


def phi(n_both: Tensor, n_one: Tensor, n_other: Tensor, n_rows: int) -> Tensor:
    """Correlation of firing, float64; NaN where one of the two fires never or always."""
    n_one, n_other = n_one.double(), n_other.double()
    scatter = (n_one * (n_rows - n_one)).sqrt() * (n_other * (n_rows - n_other)).sqrt()
    return torch.where(scatter > 0, (n_rows * n_both.double() - n_one * n_other) / scatter, float("nan"))


def _may_be_parent(
    both: Tensor, latent: Tensor, counts: Tensor, n_rows: int, group: Tensor, config: HierarchyConfig
) -> Tensor:
    """[children, d_sae] bool."""
    earlier = group[None, :] < group[latent][:, None]
    return earlier & (both >= config.min_rows) & (lift(both, counts[latent][:, None], counts, n_rows) > config.min_lift)


def _parents(
    both: Tensor, latent: Tensor, counts: Tensor, n_rows: int, group: Tensor, config: HierarchyConfig
) -> tuple[Tensor, Tensor, Tensor]:
    allowed = _may_be_parent(both, latent, counts, n_rows, group, config)
    # Whole numbers, and between equal ones a share below 1 that is larger for the rarer parent.
    score = both.double() + 1 - counts.double() / (n_rows + 1)
    child, parent, _ = _top(torch.where(allowed, score, -torch.inf), config.parents)
    return parent, latent[child], both[child, parent]


def _partners(
    both: Tensor, latent: Tensor, counts: Tensor, n_rows: int, config: HierarchyConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    value = phi(both, counts[latent][:, None], counts, n_rows)
    allowed = (both >= config.min_rows) & ~value.isnan()
    allowed[torch.arange(len(latent)), latent] = False
    row, other, rank = _top(torch.where(allowed, value, -torch.inf), config.partners)
    return latent[row], other, rank + 1, both[row, other], value[row, other]


def _best(both: Tensor, latent: Tensor, counts: Tensor, n_rows: int, group: Tensor, config: HierarchyConfig) -> Tensor:
    allowed = _may_be_parent(both, latent, counts, n_rows, group, config)
    n_both = torch.where(allowed, both, 0)
    sizes = torch.bincount(group).tolist()
    largest = torch.stack([part.amax(1) for part in n_both.split(sizes, dim=1)])
    return largest.double() / counts[latent].clamp_min(1)


def _top(score: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, rank from 0) of the n largest finite scores of each row, ordered by row and rank."""
    smallest = score.topk(min(n, score.shape[1]), dim=1).values[:, -1:]
    # All that reach it, in the order of the columns: of equal scores the first ones stay, whichever topk took.
    row, column = ((score >= smallest) & score.isfinite()).nonzero(as_tuple=True)
    order = score[row, column].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, column = row[order], column[order]
    rank = torch.arange(len(row)) - torch.searchsorted(row, row)
    return row[rank < n], column[rank < n], rank[rank < n]


def edge_cosines(W_dec: Tensor, edges: Edges) -> Tensor:
    """[n_edges] float32 cosine of the decoder rows of parent and child."""
    rows = F.normalize(W_dec.float().cpu(), dim=1)
    parts = [
        (rows[parent] * rows[child]).sum(1)
        for parent, child in zip(edges.parent.split(65_536), edges.child.split(65_536), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)
