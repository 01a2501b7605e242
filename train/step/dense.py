"""The dense backend: five GEMMs of the encoder's size, no gathers. For fast matrix units."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .dead import DeadBlock
from .gemm import gemm, low_copy
from .gradients import Gradients
from .nested_loss import nested_loss_, total_scatter
from .sparse_acts import SparseActs, bag_starts, bag_sums


def dense_gradients(
    x: Tensor,
    y: Tensor,
    weights: dict[str, Tensor],
    kept: SparseActs,
    dead: DeadBlock | None,
    *,
    group_sizes: tuple[int, ...],
    group_weights: tuple[float, ...],
    target_variance: float,
    aux_coef: Tensor | float,
    low: torch.dtype | None = None,
    join: Callable[[Tensor], Tensor] = lambda planes: planes,
    residual_scatter: Callable[[Tensor], Tensor] = total_scatter,
) -> Gradients:
    """Loss and gradients by whole matrices; the arguments and the result of `sparse_gradients`.

    No shape depends on the data beyond those of kept and dead, so the function can be compiled or captured in a CUDA
    graph. With `low` the operands of every GEMM are rounded to that type; sums, results, errors and gradients are fp32.
    The entries of `kept` are distinct.
    """
    (batch, d_out), n_groups = y.shape, len(group_sizes)
    W_dec, W_skip = weights["W_dec"], weights.get("W_skip")
    d_sae = W_dec.shape[0]
    W_low = low_copy(W_dec, low)
    where = kept.rows.long() * d_sae + kept.latents
    flat = torch.zeros(batch * d_sae, dtype=W_low.dtype, device=x.device)
    acts = flat.scatter_(0, where, low_copy(kept.acts, low)).view(batch, d_sae)
    base = weights["b_dec"] - y
    if W_skip is not None:
        base = base + x @ W_skip
    planes = torch.empty(n_groups + (dead is not None), batch, d_out, device=x.device)
    spans = list(pairwise(accumulate(group_sizes, initial=0)))
    for plane, (start, end) in zip(planes, spans, strict=False):
        gemm(acts[:, start:end], W_low[start:end], plane)
    if dead is not None:
        dead.decode_(W_dec, planes[n_groups])
    planes = join(planes)
    nested = nested_loss_(
        planes,
        base,
        weights=group_weights,
        target_variance=target_variance,
        aux_coef=None if dead is None else aux_coef,
        residual_scatter=residual_scatter,
    )
    low_planes = low_copy(planes[:n_groups], low)
    # a row for each latent, so that every product fills contiguous rows
    d_acts, d_W_dec = torch.empty(d_sae, batch, device=x.device), torch.empty_like(W_dec)
    for plane, (start, end) in zip(low_planes, spans, strict=True):
        gemm(W_low[start:end], plane.t(), d_acts[start:end])
        gemm(acts[:, start:end].t(), plane, d_W_dec[start:end])
    d_kept = d_acts.view(-1)[kept.latents.long() * batch + kept.rows]
    del d_acts, low_planes, W_low
    if kept.selected is not None:
        d_kept = torch.where(kept.selected, d_kept, 0.0)
    # the same entries as those of acts, whose matrix is not needed any more
    d_pre = flat.scatter_(0, where, low_copy(d_kept, low)).view(batch, d_sae)
    d_W_enc = gemm(d_pre.t(), low_copy(x, low))
    by_latent, order = kept.latents.sort(stable=True)
    sums = bag_sums(torch.stack([d_kept, kept.acts * d_kept], 1), order, bag_starts(by_latent, d_sae))
    d_b_enc, decoder_dot = sums[:, 0].contiguous(), sums[:, 1].contiguous()
    if dead is not None:
        of_dead = dead.gradients(x, W_dec, planes[n_groups])
        of_dead.add_to("b_enc", d_b_enc)
        of_dead.add_to("decoder_dot", decoder_dot)
        of_dead.add_to("W_enc", d_W_enc)
        of_dead.add_to("W_dec", d_W_dec)
    small = {"b_enc": d_b_enc, "b_dec": planes[0].sum(0)}
    if W_skip is not None:
        small["W_skip"] = x.t() @ planes[0]
    whole = {"W_enc": d_W_enc, "W_dec": d_W_dec}
    return Gradients(nested, small, decoder_dot, lambda name, start, end: whole[name][start:end], stored=True)
