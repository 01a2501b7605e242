"""From gradients to new weights in two walks over them: project and measure, then clip, Adam and renormalise."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from .gradients import Gradients
from .state import StepState

CHUNK_ELEMENTS = (
    1 << 19
)  # 2 MiB a tensor: a chunk of weight, gradient and both moments stays in cache for all its passes
KEPT_GRADIENT_BYTES = 96 << 20  # above this the big gradients are computed twice rather than held


@dataclass(frozen=True, slots=True)
class Measured:
    """The projected gradients' global norm (0-d fp32) and the chunks that were worth keeping."""

    norm: Tensor
    chunks: dict[tuple[str, int], Tensor]


def _spans(weight: Tensor) -> list[tuple[int, int]]:
    d_sae, width = weight.shape
    n_rows = d_sae if weight.is_cuda else max(1, CHUNK_ELEMENTS // width)
    return [(start, min(start + n_rows, d_sae)) for start in range(0, d_sae, n_rows)]


def _projected(gradients: Gradients, name: str, weight: Tensor, start: int, end: int) -> Tensor:
    """Gradient rows; W_dec's without the part along the row itself, which would only change its norm."""
    rows = gradients.rows(name, start, end)
    if name != "W_dec":
        return rows
    return rows.addcmul_(weight[start:end], gradients.decoder_dot[start:end, None], value=-1)


def measure(
    gradients: Gradients,
    state: StepState,
    *,
    over_ranks: Callable[[Tensor], Tensor] = lambda total: total,
    common: Collection[str] = (),
) -> Measured:
    """First walk: project dW_dec off its rows and add up the squared norm of everything.

    Where `state` holds a part of the latents, `over_ranks` adds up the squares of all parts; the gradients of the
    names in `common` are the same on every rank and count once.
    """
    weights = state.weights()
    bytes_held = 4 * (weights["W_enc"].numel() + weights["W_dec"].numel())
    keep = gradients.stored or bytes_held <= KEPT_GRADIENT_BYTES or weights["W_enc"].is_cuda
    chunks: dict[tuple[str, int], Tensor] = {}
    squares = [torch.dot(g.reshape(-1), g.reshape(-1)) for name, g in gradients.small.items() if name not in common]
    shared = [torch.dot(g.reshape(-1), g.reshape(-1)) for name, g in gradients.small.items() if name in common]
    for name in ("W_enc", "W_dec"):
        for start, end in _spans(weights[name]):
            rows = _projected(gradients, name, weights[name], start, end)
            squares.append(torch.dot(rows.view(-1), rows.view(-1)))
            if keep:
                chunks[name, start] = rows
    total = torch.stack(squares).sum(dtype=torch.float64)
    total = over_ranks(total)
    if shared:
        total = total + torch.stack(shared).sum(dtype=torch.float64)
    return Measured(total.sqrt().float(), chunks)


def apply(
    gradients: Gradients,
    measured: Measured,
    state: StepState,
    *,
    lr: float | Tensor,
    clip_norm: float,
    betas: tuple[float, float],
    eps: float,
    skip: Tensor | None = None,
) -> None:
    """Second walk: clip to `clip_norm`, fused Adam, decoder rows back to unit norm; one chunk of rows at a time.

    `skip` (CUDA only): 0-d fp32, 1 when the batch was not finite; every tensor then keeps its value, without the
    host knowing.
    """
    weights = state.weights()
    clip = (measured.norm / clip_norm).clamp_min(1.0)
    # Adam's kernel divides by the scale as it reads; None spares it writing the scaled gradient back
    scale = clip if skip is not None or float(clip) > 1.0 else None
    step = state.step.float()

    def update(name: str, gradient: Tensor, start: int, end: int) -> None:
        part = weights[name][start:end]
        adam(
            [part],
            [gradient],
            [state.exp_avg[name][start:end]],
            [state.exp_avg_sq[name][start:end]],
            [],
            [step.clone()],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
            grad_scale=scale,
            found_inf=skip,
        )
        if name == "W_dec":
            norm = torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp_min(
                math.sqrt(torch.finfo(torch.float32).tiny)
            )
            part.div_(norm if skip is None else torch.where(skip > 0, 1.0, norm))

    for name, gradient in gradients.small.items():
        update(name, gradient, 0, gradient.shape[0])
    for name in ("W_enc", "W_dec"):
        for start, end in _spans(weights[name]):
            rows = measured.chunks.pop((name, start), None)
            if rows is None:
                rows = _projected(gradients, name, weights[name], start, end)
            update(name, rows, start, end)
    state.step.add_(1 if skip is None else (1 - skip).long())
