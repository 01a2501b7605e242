"""The nested loss and its gradient, for all prefixes at once, on planes [group, batch, d_out].

    y_hat_i = sum_{j <= i} acts[:, group j] @ W_dec[group j] + b_dec (+ x @ W_skip)
    L       = sum_i w_i mean_b ||y_hat_i - y||^2 / V_y + coef * L_aux                        (design.md, section 5)
    L_aux   = mean_b ||a - r||^2 / var(r),  r = y - y_hat_G detached,  a = dead pre-activations @ W_dec

Group j is part of the reconstructions j, j+1, ..., G-1, so decoding is a running sum over planes and the gradient of
group j's decode is a suffix sum of the residuals: every prefix is trained for the price of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NestedLoss:
    """What one batch gave; all 0-d fp32 unless said otherwise. The planes were turned into gradients in place."""

    loss: Tensor
    """L, the quantity that is optimised, aux term included."""
    aux_loss: Tensor
    """L_aux before its coefficient; 0 when nothing is dead."""
    sq_err: Tensor
    """[n_groups]: sum over the batch of ||y_hat_i - y||^2."""


def total_scatter(values: Tensor) -> Tensor:
    """sum over the rows of ||v - mean(v)||^2, 0-d; values [batch, d]."""
    return values.var(0, correction=0).sum() * values.shape[0]


def nested_loss_(
    planes: Tensor,
    base: Tensor,
    *,
    weights: tuple[float, ...],
    target_variance: float,
    aux_coef: Tensor | float | None = None,
    residual_scatter: Callable[[Tensor], Tensor] = total_scatter,
) -> NestedLoss:
    """Turn the decoded planes into d L / d planes, in place.

    planes [n_groups (+ 1), batch, d_out]: each group's own decode, then (when `aux_coef` is given) the decode of the
    dead latents; base [batch, d_out]: b_dec (+ x @ W_skip) - y; weights: w_i, one a group; aux_coef: the coefficient
    with its min(n_dead / k_aux, 1); residual_scatter: r -> var(r) * batch. After the call planes[0] is also the
    gradient of b_dec and of the skip's output.
    """
    n_groups, batch = len(weights), base.shape[0]
    planes[0].add_(base)
    for i in range(1, n_groups):
        planes[i].add_(planes[i - 1])
    flat = planes.view(planes.shape[0], -1)
    sq_err = torch.stack([torch.dot(flat[i], flat[i]) for i in range(n_groups)])
    scale = [w / (batch * target_variance) for w in weights]
    loss = sq_err[0] * scale[0]
    for i in range(1, n_groups):
        loss = loss + sq_err[i] * scale[i]
    aux_loss = torch.zeros((), device=planes.device)
    if aux_coef is not None:
        # the residual is -planes[n_groups - 1]; its variance is that of the error
        sum_variance = residual_scatter(planes[n_groups - 1]).clamp_min(torch.finfo(torch.float32).tiny)
        planes[n_groups].add_(planes[n_groups - 1])
        # on fixed shapes the plane exists even when nothing is dead; its coefficient is 0 then
        aux_loss = torch.dot(flat[n_groups], flat[n_groups]) / sum_variance * (aux_coef > 0)
        loss = loss + aux_coef * aux_loss
        planes[n_groups].mul_(2 * aux_coef / sum_variance)
    planes[n_groups - 1].mul_(2 * scale[n_groups - 1])
    for i in reversed(range(n_groups - 1)):
        torch.add(planes[i + 1], planes[i], alpha=2 * scale[i], out=planes[i])
    return NestedLoss(loss, aux_loss, sq_err)
