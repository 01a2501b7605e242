"""The aux loss's entries: in each row the k_aux largest PRE-activations of dead latents."""

import torch
from torch import Tensor

from .entries import Kept
from .selection import TILE_ELEMENTS


def select_dead(x: Tensor, W_enc: Tensor, b_enc: Tensor, dead: Tensor, k_aux: int) -> Kept:
    """Entries in row order, min(k_aux, n_dead) a row; acts may be negative. dead: int64 [n_dead] latent indices.

    Works through the dead latents in tiles with a running top-k, so that memory does not grow with their number.
    """
    k = min(k_aux, dead.shape[0])
    width = max(k, TILE_ELEMENTS // x.shape[0])
    best, latents = torch.empty(x.shape[0], 0), torch.empty(x.shape[0], 0, dtype=torch.int64)
    for part in dead.split(width):
        pre = torch.addmm(b_enc[part], x, W_enc[part].t())
        n_held = best.shape[1]
        top = torch.cat([best, pre], dim=1).topk(min(k, n_held + part.shape[0]), dim=1, sorted=False)
        new = part[(top.indices - n_held).clamp_min(0)]
        if n_held:
            held = latents.gather(1, top.indices.clamp_max(n_held - 1))
            new = torch.where(top.indices < n_held, held, new)
        best, latents = top.values, new
    rows = torch.arange(x.shape[0], dtype=torch.int32).repeat_interleave(k)
    return Kept(rows, latents.view(-1).int(), best.reshape(-1))


def select_dead_fixed_shape(x: Tensor, W_enc: Tensor, b_enc: Tensor, is_dead: Tensor, k_aux: int) -> Kept:
    """The same with shapes that do not depend on the data, for CUDA: always k_aux entries a row.

    Where fewer latents are dead the surplus entries are not `selected`; the caller's coefficient is 0 when none is.
    is_dead: bool [d_sae].
    """
    k = min(k_aux, W_enc.shape[0])
    n_rows = max(1, 8 * TILE_ELEMENTS // W_enc.shape[0])
    values, indices = [], []
    for part in x.split(n_rows):
        pre = torch.addmm(b_enc, part, W_enc.t()).masked_fill_(~is_dead, -torch.inf)
        top = pre.topk(k, dim=1, sorted=False)
        values.append(top.values)
        indices.append(top.indices)
    acts = torch.cat(values).view(-1)
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).repeat_interleave(k)
    selected = acts > -torch.inf
    return Kept(rows, torch.cat(indices).view(-1).int(), torch.where(selected, acts, 0.0), selected)
