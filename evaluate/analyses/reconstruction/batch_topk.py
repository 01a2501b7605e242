"""BatchTopK mode: the k x rows largest activations of a whole batch, as in training, whatever the threshold.

    acts = relu(pre_acts) where it is among the k * rows largest of the batch, else 0        (arXiv 2412.06410, eq. 2)

Beside the threshold mode it shows what calibrating the threshold costs. A row's result depends on the rest of its
batch, so batches are always cut alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka.transcoder import Transcoder

from ...measures.activations import SparseActs, row_tiles

CANDIDATE_SCALE = 0.8
"""Activations above this share of the last batch's smallest choice are candidates; batches cut at about the same."""


def topk_among(candidates: SparseActs, n: int, floor: Float[Tensor, " d_sae"]) -> Tensor | None:
    """[n_active] bool: the n largest of `candidates`, which are the activations above `floor`.

    None when they may not be the n largest of the batch: there are too few, or the smallest one chosen is below the
    highest floor, so that one that was never a candidate could be larger.
    """
    if len(candidates.value) < n:
        return None
    top = candidates.value.topk(n, sorted=False)
    if float(top.values.min()) < float(floor.max()):
        return None
    return torch.zeros_like(candidates.value, dtype=torch.bool).index_fill_(0, top.indices, True)


def topk_of_all(transcoder: Transcoder, x: Float[Tensor, "rows d_in"], n: int) -> SparseActs:
    """The n largest positive activations of the batch, encoded for that alone.

    The best so far and the best of each tile of rows meet in a final.
    """
    d_sae = transcoder.config.d_sae
    values, entries = x.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=x.device)
    for start, pre_acts in row_tiles(transcoder, x):
        flat = pre_acts.flatten()
        top = flat.topk(min(n, len(flat)), sorted=False)
        values = torch.cat([values, top.values])
        entries = torch.cat([entries, top.indices + start * d_sae])
        final = values.topk(min(n, len(values)), sorted=False)
        values, entries = final.values, entries[final.indices]
    values, entries = values[values > 0], entries[values > 0]
    order = entries.argsort()
    entries = entries[order]
    return SparseActs(len(x), entries // d_sae, entries % d_sae, values[order])


def swapped(candidates: SparseActs, one: Tensor, other: Tensor) -> SparseActs:
    """other - one, where both are chosen among `candidates` by a mask: what only `one` has, with the sign turned."""
    changed = candidates.where(one != other)
    leaves = one[one != other]
    return SparseActs(changed.n_rows, changed.row, changed.latent, torch.where(leaves, -changed.value, changed.value))
