"""The decoder directions nearest to each one, for links between latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

N_NEAREST = 8
_TILE_BYTES = 256 * 2**20


def nearest_directions(
    W_dec: Float[Tensor, "d_sae d_out"], n_nearest: int = N_NEAREST
) -> list[list[tuple[int, float]]]:
    """(latent, cosine) of the other latents with the largest cosines, best first; costs one product of d_sae rows."""
    d_sae = len(W_dec)
    n_nearest = min(n_nearest, d_sae - 1)
    if n_nearest == 0:
        return [[]]
    rows = F.normalize(W_dec.detach().float(), dim=1)
    found: list[list[tuple[int, float]]] = []
    tile = max(1, _TILE_BYTES // (4 * d_sae))
    for start in range(0, d_sae, tile):
        products = rows[start : start + tile] @ rows.T
        own = torch.arange(len(products))
        products[own, own + start] = -torch.inf
        cosines, latents = products.topk(n_nearest, dim=1)
        for names, values in zip(latents.tolist(), cosines.tolist(), strict=True):
            found.append([(name, round(value, 3)) for name, value in zip(names, values, strict=True)])
    return found
