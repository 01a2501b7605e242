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

from .active import Active, row_tiles

CANDIDATE_SCALE = 0.8
"""Activations above this share of the last batch's smallest choice are candidates; batches cut at about the same."""


def batch_topk(
    transcoder: Transcoder, x: Float[Tensor, "rows d_in"], candidates: Active, floor: Float[Tensor, " d_sae"]
) -> Active:
    """The k * rows largest positive activations of the batch, in the order of `Active`.

    `candidates` are the activations above `floor`. When the smallest one chosen lies below the highest floor, one that
    was never a candidate could be larger; then the batch is encoded again without a floor.
    """
    n = transcoder.config.k * len(x)
    if len(candidates.value) >= n:
        chosen = candidates.value.topk(n, sorted=False).indices.sort().values
        top = Active(candidates.n_rows, candidates.row[chosen], candidates.latent[chosen], candidates.value[chosen])
        if float(top.value.min()) >= float(floor.max()):
            return top
    return _search_all(transcoder, x, n)


def _search_all(transcoder: Transcoder, x: Tensor, n: int) -> Active:
    """The n largest among all pre-activations; the best so far and the best of each tile of rows meet in a final."""
    d_sae = transcoder.config.d_sae
    values, places = x.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=x.device)
    for start, pre_acts in row_tiles(transcoder, x):
        flat = pre_acts.flatten()
        top = flat.topk(min(n, len(flat)), sorted=False)
        values = torch.cat([values, top.values])
        places = torch.cat([places, top.indices + start * d_sae])
        final = values.topk(min(n, len(values)), sorted=False)
        values, places = final.values, places[final.indices]
    values, places = values[values > 0], places[values > 0]
    order = places.argsort()
    places = places[order]
    return Active(len(x), places // d_sae, places % d_sae, values[order])


def exclusive_parts(one: Active, other: Active, d_sae: int) -> Active:
    """The activations of only one of the two, those of only `one` with the opposite sign: other - one."""
    keys, other_keys = one.row * d_sae + one.latent, other.row * d_sae + other.latent
    lost, won = one.where(~torch.isin(keys, other_keys)), other.where(~torch.isin(other_keys, keys))
    row = torch.cat([lost.row, won.row])
    latent = torch.cat([lost.latent, won.latent])
    order = (row * d_sae + latent).argsort()
    return Active(one.n_rows, row[order], latent[order], torch.cat([-lost.value, won.value])[order])
