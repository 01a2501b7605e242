"""The norm behind a residual site, and what a sublayer reads through it: the input conventions, computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from matryoshka.errors import UserError
from matryoshka.sites import input_conventions

_SAME_NORM = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative L2 difference up to which our formula of a norm is the model's; 1e-5 in other types."""


@dataclass(frozen=True, eq=False)
class Norm:
    """The norm a sublayer applies to the residual it reads, kept so that its input can be rebuilt from the residual.

    kind "rms":    n = r * rsqrt(mean(r^2) + eps)                            u = n * gain
    kind "layer":  n = (r - mean(r)) * rsqrt(mean((r - mean(r))^2) + eps)    u = n * gain + bias

    `gain` [d] float32 is the EFFECTIVE factor: 1 + w where the model stores an offset (Gemma). `bias` is [d] or None.
    (Zhang & Sennrich 2019, eq. 4; Ba et al. 2016, eq. 3.)
    """

    kind: Literal["rms", "layer"]
    eps: float
    gain: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise UserError(f'There is no norm of kind "{self.kind}". The kinds are rms and layer.')

    def normalized(self, r: Tensor) -> Tensor:
        """n: `r` [..., d] normalised, without gain and bias; float32, whatever the type of `r`."""
        r = r.float()
        if self.kind == "layer":
            r = r - r.mean(-1, keepdim=True)
        return r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + self.eps)

    def with_gain(self, r: Tensor) -> Tensor:
        """u = n * gain (+ bias), what the sublayer reads; `r` [..., d] of any float type -> float32."""
        u = self.normalized(r) * self.gain.to(r.device)
        return u if self.bias is None else u + self.bias.to(r.device)


def apply_convention(x: Tensor, convention: str, *, source_site: str, norm: Norm | None) -> Tensor:
    """Turn raw activations of `source_site` into what a transcoder of this input convention reads.

    Args:
        x: [..., d], raw, any float type.
        convention: one of `input_conventions(source_site)`.
        norm: the norm that follows the source site in the model; only the raw convention does without.

    Returns:
        [..., d] float32; `x` itself when it is float32 already and the convention is raw.

    Raises:
        UserError: the source site has no such convention, or it needs a norm and there is none.
    """
    allowed = input_conventions(source_site)
    if convention not in allowed:
        raise UserError(
            f'The input convention "{convention}" does not exist for the source site {source_site}. '
            f"Choose one of {', '.join(allowed)}."
        )
    if convention == source_site:
        return x.float()
    if norm is None:
        raise UserError(
            f'The input convention "{convention}" needs the norm that follows {source_site}, and none is stored: the '
            f'model has no norm there that reads exactly this tensor. Use the raw input, "{source_site}".'
        )
    if x.shape[-1] != norm.gain.shape[-1]:
        raise UserError(
            f"The activations have {x.shape[-1]} dimensions and the norm has {norm.gain.shape[-1]}. They are not of "
            "the same model: harvest the shard set again."
        )
    return norm.normalized(x) if convention == "normalized" else norm.with_gain(x)


def fit_norm(module: nn.Module, reads: Tensor, gives: Tensor) -> Norm | None:
    """The `Norm` that a norm module computes, from its weights and one pair of its input and output [..., d].

    The output alone tells which formula it is, and whether the weight is the gain or its offset from 1 (Gemma,
    Nemotron); a module without a weight has the gain 1 (OLMo, NanoChat). eps is the module's own, or what its answer
    to small inputs shows. None when no formula gives the output to the rounding of its type.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((float(getattr(module, name)) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    if isinstance(weight, Tensor):
        w = weight.detach().float().cpu()
        gains = (w, 1 + w)
    elif any(True for _ in module.parameters()):
        return None  # its weights have names of their own
    else:
        gains = (torch.ones(reads.shape[-1]),)
    b = bias.detach().float().cpu() if isinstance(bias, Tensor) else None
    kinds: tuple[tuple[Literal["rms", "layer"], Tensor | None], ...] = (("rms", None), ("layer", b))
    forms = []
    for kind, shift in kinds:
        known = _eps_of(module, reads, kind) if eps is None and not isinstance(weight, Tensor) else eps
        forms += [] if known is None else [Norm(kind, known, gain, shift) for gain in gains]
    if not forms:
        return None
    differences = [float((form.with_gain(reads) - gives.float()).norm() / gives.float().norm()) for form in forms]
    best = min(range(len(forms)), key=differences.__getitem__)
    return forms[best] if differences[best] <= max(_SAME_NORM.get(t.dtype, 1e-5) for t in (reads, gives)) else None


def _eps_of(module: nn.Module, reads: Tensor, kind: Literal["rms", "layer"]) -> float | None:
    """eps of a norm without weights, to one digit: mean(n^2) = v / (v + eps) for an input of variance v near eps."""
    small = reads.float() * (1e-5 / reads.float().pow(2).mean(-1, keepdim=True)).sqrt()
    with torch.inference_mode():
        n = module(small.to(reads.dtype)).float()
    if kind == "layer":
        small = small - small.mean(-1, keepdim=True)
    v = small.pow(2).mean(-1)
    eps = float((v * (1 / n.pow(2).mean(-1) - 1)).mean())
    return float(f"{eps:.0e}") if eps > 0 else None
