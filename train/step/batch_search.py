"""BatchTopK on a GPU: one top-k over the whole batch, in low precision where there are units for it, then fp32.

No shape depends on the data, so the host never waits. The CPU's way (selection.py) is a bound that is carried from step
to step; here a radix select over all pre-activations costs no more than a comparison with a bound and its compaction
would, and has no bound to miss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm import low_copy
from .sparse_acts import SparseActs, bag_starts, row_dots

TILE_BYTES = 1 << 29
"""Pre-activations at once, 512 MiB: one tile for layer 17 at batches of 4,096."""
_MIN_SPARE = 1024


def spare(n: int) -> int:
    """How many entries on either side of the n-th low precision may confuse: an eighth of n.

    bf16 rounds a result by up to 1/512 of it. Where the n-th activation is 2.6 deviations up (96 of 18,432), an eighth
    more or fewer entries reach to 0.983 and 1.018 of it.
    """
    return max(n // 8, _MIN_SPARE)


def search_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, n: int, *, low: torch.dtype | None, exact: bool = True
) -> SparseActs:
    """The `n` largest activations of the batch; x [batch, d_in], W_enc [d_sae, d_in], b_enc [d_sae].

    Always n entries (all there are, if fewer), in the order of row * d_sae + latent; those that are not positive are
    not `selected` and carry acts 0. Equals go to the smallest row * d_sae + latent, as on the CPU.

    With `low` the search runs in that type, and fp32 decides about what it found: an fp32 step keeps the same, unless
    more than spare(n) entries are so close to the n-th that `low` rounds them across it. `exact`: all activations are
    computed again in fp32; else those within spare(n) of the n-th, and the larger ones stay as `low` gave them.
    """
    batch, d_sae = x.shape[0], W_enc.shape[0]
    n_all, n_spare = batch * d_sae, 0 if low is None else spare(n)
    n_sure = 0 if low is None or exact else max(0, n - n_spare)
    rough, where = _largest(x, W_enc, b_enc, min(n + max(n_spare, _MIN_SPARE), n_all), low)
    if n_sure:
        rough, order = rough.sort(descending=True)
        where = where[order]
    near, order = where[n_sure:].sort()
    rows, latents = _split(near, d_sae)
    acts = rough[order]
    if low is not None:
        acts = row_dots(bag_starts(rows, batch), latents, x, W_enc) + b_enc[latents]
    # a stable sort leaves equals in the order of `near`
    best = acts.sort(descending=True, stable=True).indices[: n - n_sure].sort().values
    acts, near = acts[best], near[best]
    if n_sure:
        near, order = torch.cat([where[:n_sure], near]).sort()
        acts = torch.cat([rough[:n_sure].float(), acts])[order]
    rows, latents = _split(near, d_sae)
    selected = acts > 0
    return SparseActs(rows, latents, torch.where(selected, acts, 0.0), selected)


def _largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, n: int, low: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The n largest pre-activations as `low` gives them, in no order, and row * d_sae + latent of each."""
    batch, d_sae = x.shape[0], W_enc.shape[0]
    operand = low_copy(x, low)
    width = min(d_sae, max(64, TILE_BYTES // (operand.element_size() * batch)))
    rough, where = [], []
    for start in range(0, d_sae, width):
        tile = slice(start, min(start + width, d_sae))
        pre = torch.addmm(low_copy(b_enc[tile], low), operand, low_copy(W_enc[tile], low).t())
        best = pre.view(-1).topk(min(n, pre.numel()), sorted=False)
        row = best.indices.div(pre.shape[1], rounding_mode="floor")
        rough.append(best.values)
        where.append(best.indices + row * (d_sae - pre.shape[1]) + start)
    if len(rough) == 1:
        return rough[0], where[0]
    best = torch.cat(rough).topk(n, sorted=False)
    return best.values, torch.cat(where)[best.indices]


def _split(where: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Row and latent of row * d_sae + latent, int32."""
    row = where.div(d_sae, rounding_mode="floor")
    return row.int(), (where - row * d_sae).int()
