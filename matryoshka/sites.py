"""Sites of a transformer block: their names, their hook points, and what is computed from a residual at one.

A site names one tensor of a block, in order: `resid_pre` (what enters the block), `attn_out` (what attention adds),
`resid_mid` = resid_pre + attn_out, `mlp_out` (what the MLP adds), `resid_post` = resid_mid + mlp_out. The two `_out`
sites are what is ADDED to the residual stream: after the post-norm in models that have one (Gemma-2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from matryoshka.errors import UserError

SITES: tuple[str, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

# What the sublayer that follows a residual site really reads: the residual after the norm, with its gain.
_SUBLAYER_INPUT = {"resid_mid": "mlp_in", "resid_pre": "attn_in"}


def hook_point(site: str, layer: int) -> str:
    """The TransformerLens name of a site, such as `blocks.17.hook_resid_mid`.

    Raises:
        UserError: unknown site or negative layer. Whether the layer exists is for the model to say.
    """
    if site not in SITES:
        raise UserError(f'There is no site "{site}". The sites of a block are {", ".join(SITES)}.')
    if layer < 0:
        raise UserError(f"Layer {layer} is negative. Layers are counted from 0 at the embedding.")
    return f"blocks.{layer}.hook_{site}"


@dataclass(frozen=True)
class Site:
    """One tensor of one block: `Site("resid_mid", 17)`."""

    name: str
    layer: int

    def __post_init__(self) -> None:
        hook_point(self.name, self.layer)

    @property
    def hook_point(self) -> str:
        return hook_point(self.name, self.layer)

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read "8:resid_mid". Raises UserError on any other form."""
        layer, colon, name = text.partition(":")
        if not colon or not layer.strip().isdecimal():
            raise UserError(f'"{text}" is not a site. Write the layer, a colon and the site, as in "8:resid_mid".')
        return cls(name.strip(), int(layer))

    def __str__(self) -> str:
        return f"{self.layer}:{self.name}"


@dataclass(frozen=True)
class HookPair:
    """What a transcoder reads (`source`) and what it predicts (`target`); the two may lie in different layers."""

    source: Site
    target: Site

    @property
    def deepest_layer(self) -> int:
        """The last block that a forward pass has to run."""
        return max(self.source.layer, self.target.layer)

    @classmethod
    def at_layer(cls, layer: int) -> HookPair:
        """The usual pair: resid_mid -> mlp_out of one layer."""
        return cls(Site("resid_mid", layer), Site("mlp_out", layer))


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


def fit_norm(module: nn.Module, reads: Tensor, gives: Tensor, *, tolerance: float) -> Norm | None:
    """The `Norm` that a norm module computes, from its weights and one pair of its input and output [..., d].

    The output alone tells which formula it is, and whether the weight is the gain or its offset from 1 (Gemma,
    Nemotron); a module without a weight has the gain 1 (OLMo, NanoChat). eps is the module's own, or what its answer
    to small inputs shows. None when no formula comes within `tolerance` (relative L2 difference).
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
    return forms[best] if differences[best] <= tolerance else None


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


def _input_conventions() -> dict[str, tuple[str, ...]]:
    return {site: (site, "normalized", _SUBLAYER_INPUT[site]) if site in _SUBLAYER_INPUT else (site,) for site in SITES}


INPUT_CONVENTIONS: dict[str, tuple[str, ...]] = _input_conventions()
"""Source site -> the forms in which a transcoder may read it: raw (the site's own name), `normalized` (n), and what
the sublayer really reads (u): `mlp_in` for resid_mid, `attn_in` for resid_pre."""


def input_conventions(source_site: str) -> tuple[str, ...]:
    """The input conventions that a source site allows, raw first. Raises UserError for an unknown site."""
    if source_site not in INPUT_CONVENTIONS:
        raise UserError(f'There is no site "{source_site}". The sites of a block are {", ".join(SITES)}.')
    return INPUT_CONVENTIONS[source_site]


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
