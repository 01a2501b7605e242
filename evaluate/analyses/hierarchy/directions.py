"""How similar decoder directions of the groups are to each other.

mean_abs_cosine_gh = mean over latents i of group g and j of group h, i != j, of |cos(W_dec[i], W_dec[j])|
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_BYTES = 256 * 2**20


def mean_abs_cosines(W_dec: Tensor, group_sizes: tuple[int, ...], alive: Tensor) -> Tensor:
    """[n_groups, n_groups] float64 over the latents that `alive` [d_sae] bool marks; NaN where there is no pair."""
    n_groups = len(group_sizes)
    group = torch.repeat_interleave(torch.arange(n_groups), torch.tensor(group_sizes))[alive.cpu()]
    rows = F.normalize(W_dec.float()[alive.to(W_dec.device)], dim=1)
    member = F.one_hot(group, n_groups).to(rows)
    sums = torch.zeros(n_groups, n_groups, dtype=torch.float64)
    tile = max(1, _TILE_BYTES // (4 * max(len(rows), 1)))
    for start in range(0, len(rows), tile):
        cosine = (rows[start : start + tile] @ rows.T).abs()
        own = torch.arange(len(cosine), device=rows.device)
        cosine[own, own + start] = 0
        by_group = (cosine @ member).cpu().double()
        sums.index_add_(0, group[start : start + tile], by_group)
    sizes = torch.bincount(group, minlength=n_groups).double()
    return sums / (sizes[:, None] * sizes - torch.diag(sizes))
