"""What ranks that take a step together tell each other. Every rank must make the same calls in the same order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from matryoshka.ranks import Rank

from ..step.sparse_acts import SparseActs


def sum_(part: Tensor) -> Tensor:
    """The sum over ranks, in place, the same bits on each."""
    dist.all_reduce(part)
    return part


def smallest_(part: Tensor) -> Tensor:
    """The minimum over ranks, in place."""
    dist.all_reduce(part, dist.ReduceOp.MIN)
    return part


def gather(own: Tensor, rank: Rank) -> Tensor:
    """[world, *shape of own]: that of every rank, the same bits on each."""
    everyone = own.new_empty(rank.world, *own.shape)
    dist.all_gather(list(everyone.unbind(0)), own.contiguous())
    return everyone


def among_largest(own: SparseActs, offers: Tensor, n: int, rank: Rank) -> SparseActs:
    """Of a rank's entries those that are among the `n` largest of all `offers` [world, entries of a rank], with shapes
    that do not depend on the data; a rank may have fewer entries than it has offers. Ties fall as torch.topk lets them,
    alike on each rank."""
    best = offers.view(-1).topk(min(n, offers.numel()), sorted=False).indices
    chosen = torch.zeros(offers.numel(), dtype=torch.bool, device=offers.device).index_fill_(0, best, True)
    selected = chosen.view(offers.shape)[rank.index, : own.acts.shape[0]]
    selected = selected if own.selected is None else selected & own.selected
    return SparseActs(own.rows, own.latents, torch.where(selected, own.acts, 0.0), selected)
