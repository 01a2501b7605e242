"""The dense backend: five GEMMs of the encoder's size, no gathers. For fast matrix units."""

from collections.abc import Callable

import torch
from torch import Tensor

from .entries import Kept
from .gradients import Gradients
from .nested import nested_loss_, squared_spread


def spread(kept: Kept, values: Tensor, batch: int, d_sae: int) -> Tensor:
    """[batch, d_sae] with `values` [n] at the entries of `kept`, 0 elsewhere. Padding adds 0, hence not scatter_."""
    flat = torch.zeros(batch * d_sae, device=values.device)
    return flat.scatter_add_(0, kept.rows.long() * d_sae + kept.latents, values).view(batch, d_sae)


def at_entries(kept: Kept, whole: Tensor) -> Tensor:
    """The values of `whole` [batch, d_sae] at the entries of `kept`, 0 at padding."""
    values = whole.view(-1)[kept.rows.long() * whole.shape[1] + kept.latents]
    return values if kept.selected is None else torch.where(kept.selected, values, 0.0)


def dense_gradients(
    x: Tensor,
    y: Tensor,
    weights: dict[str, Tensor],
    kept: Kept,
    dead: Kept | None,
    *,
    group_sizes: tuple[int, ...],
    group_weights: tuple[float, ...],
    target_variance: float,
    aux_coef: Tensor | float,
    bf16: bool = False,
    join: Callable[[Tensor], Tensor] = lambda planes: planes,
    residual_spread: Callable[[Tensor], Tensor] = squared_spread,
) -> Gradients:
    """Loss and gradients by whole matrices; the arguments and the result of `sparse_gradients`.

    No shape depends on the data beyond those of kept and dead, so the function can be compiled or captured in a CUDA
    graph. With `bf16` the operands of every GEMM are rounded to bf16; sums, errors and gradients are fp32.
    """

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return (a.bfloat16() @ b.bfloat16()).float() if bf16 else a @ b

    (batch, d_out), n_groups = y.shape, len(group_sizes)
    W_dec, W_skip = weights["W_dec"], weights.get("W_skip")
    d_sae = W_dec.shape[0]
    acts = spread(kept, kept.acts, batch, d_sae)
    dead_acts = None if dead is None else spread(dead, dead.acts, batch, d_sae)
    base = weights["b_dec"] - y
    if W_skip is not None:
        base = base + x @ W_skip
    n_planes = n_groups + (dead_acts is not None)
    planes = torch.empty(n_planes, batch, d_out, device=x.device)
    spans = []
    for size in group_sizes:
        spans.append((spans[-1][1] if spans else 0, (spans[-1][1] if spans else 0) + size))
    for i, (start, end) in enumerate(spans):
        planes[i] = matmul(acts[:, start:end], W_dec[start:end])
    if dead_acts is not None:
        planes[n_groups] = matmul(dead_acts, W_dec)
    planes = join(planes)
    nested = nested_loss_(
        planes,
        base,
        weights=group_weights,
        target_variance=target_variance,
        aux_coef=None if dead_acts is None else aux_coef,
        residual_spread=residual_spread,
    )
    d_acts, d_W_dec = torch.empty_like(acts), torch.empty_like(W_dec)
    for i, (start, end) in enumerate(spans):
        d_acts[:, start:end] = matmul(planes[i], W_dec[start:end].t())
        d_W_dec[start:end] = matmul(acts[:, start:end].t(), planes[i])
    d_pre = spread(kept, at_entries(kept, d_acts), batch, d_sae)
    if dead is not None and dead_acts is not None:
        d_dead = matmul(planes[n_groups], W_dec.t())
        d_pre = d_pre + spread(dead, at_entries(dead, d_dead), batch, d_sae)
        d_W_dec = d_W_dec + matmul(dead_acts.t(), planes[n_groups])
    d_W_enc = matmul(d_pre.t(), x)
    small = {"b_enc": d_pre.sum(0), "b_dec": planes[0].sum(0)}
    if W_skip is not None:
        small["W_skip"] = x.t() @ planes[0]
    whole = {"W_enc": d_W_enc, "W_dec": d_W_dec}
    decoder_dot = (d_W_dec * W_dec).sum(1)
    return Gradients(nested, small, decoder_dot, lambda name, start, end: whole[name][start:end], stored=True)
