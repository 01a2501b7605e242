"""Decoder redundancy: how close the direction of each latent is to that of its nearest neighbour.

    max_cosine_i = max_{j != i} W_dec[i] . W_dec[j] / (|W_dec[i]| |W_dec[j]|)

The signed maximum, over all latents of the transcoder (SAEBench's "max cosine"). It is not absorption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

REDUNDANT = 0.9
_TILE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest other latent of each one."""

    cosine: Tensor
    """[d_sae] float32; NaN where there is a single latent"""
    latent: Tensor
    """[d_sae] int64; -1 where there is a single latent"""


def decoder_neighbours(W_dec: Float[Tensor, "d_sae d_out"]) -> Neighbours:
    """The other decoder row of the largest cosine, for each; costs as much as encoding d_sae rows."""
    d_sae = len(W_dec)
    if d_sae == 1:
        return Neighbours(torch.full((1,), float("nan")), torch.full((1,), -1))
    rows = F.normalize(W_dec.float(), dim=1)
    tile = max(1, _TILE_BYTES // (4 * d_sae))
    cosines, latents = [], []
    for start in range(0, d_sae, tile):
        products = rows[start : start + tile] @ rows.T
        own = torch.arange(len(products), device=rows.device)
        products[own, own + start] = -torch.inf
        cosine, latent = products.max(1)
        cosines.append(cosine.cpu())
        latents.append(latent.cpu())
    return Neighbours(torch.cat(cosines), torch.cat(latents))
