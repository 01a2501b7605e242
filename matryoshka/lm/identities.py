"""Whether the sites of a model are what their names say, found out on a few tokens of its plain forward.

    the stream     resid_post of layer L is resid_pre of layer L + 1, and both are among the model's hidden states
    attention      resid_mid  = resid_pre + attn_out
    MLP            resid_post = resid_mid + mlp_out
    parallel       resid_post = resid_pre + attn_out + mlp_out, and there is no resid_mid

resid_mid needs one of the two sums that it is part of; attn_out and mlp_out need theirs. Where a block adds more after
the MLP (Gemma 4: per-layer inputs and a scalar), mlp_out is what is added only if resid_mid + mlp_out itself can be
found: some module of the block reads it, or the block gives a multiple of it. Then a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from matryoshka.lm.failures import parallel
from matryoshka.sites import SITES, hook_point

# Two or three numbers are summed with one or two roundings, each by at most half a unit in the last place of a number
# no larger than the sum of their sizes; a scaled contribution is rounded once more. That makes 1.5; a bit of air.
_ROUNDINGS = 2.0

_Sites = Mapping[str, Tensor | None]


@dataclass
class Checked:
    """What the check of one model found."""

    refused: dict[str, str] = field(default_factory=dict)
    """hook point -> why it cannot be read."""
    notes: dict[int, str] = field(default_factory=dict)
    """Layer -> what mlp_out is, where its block adds more than attn_out and mlp_out."""


def check_sites(
    seen: Mapping[str, Tensor],
    hidden: Sequence[Tensor] | None,
    read_inside: Callable[[int], Mapping[str, Tensor]],
    n_layers: int,
    name: str,
) -> Checked:
    """Hold the identities.

    Args:
        seen: hook point of a site -> [B, T, d_model], all that a plain forward of some tokens came by.
        hidden: the hidden states of the same forward, [B, T, d_model] each, where the model gives them.
        read_inside: layer -> what the modules of its block read in such a forward, by their path.
        name: of the model, for messages.
    """
    checked = Checked()
    stream = _check_stream(seen, hidden, n_layers)
    for layer in range(n_layers):
        sites = {site: seen.get(hook_point(site, layer)) for site in SITES}
        sums, note = _check_sums(sites, lambda layer=layer: read_inside(layer), name)
        checked.refused |= {hook_point(site, layer): reason for site, reason in sums.items()}
        if note is not None:
            checked.notes[layer] = note
    checked.refused |= stream
    return checked


def is_sum(total: Tensor, *parts: Tensor) -> bool:
    """Whether each element of `total` is the sum of those of `parts`, up to the rounding of the parts' dtype."""
    if any(part.shape != total.shape for part in parts):
        return False
    sizes = torch.stack([part.double().abs() for part in parts]).sum(0)
    exact = torch.stack([part.double() for part in parts]).sum(0)
    bound = _ROUNDINGS * torch.finfo(parts[-1].dtype).eps * sizes
    return bool(((total.double() - exact).abs() <= bound).all())


def _check_stream(seen: Mapping[str, Tensor], hidden: Sequence[Tensor] | None, n_layers: int) -> dict[str, str]:
    """What is between the blocks."""
    refused = {}
    pre, post = ([seen.get(hook_point(site, n)) for n in range(n_layers)] for site in ("resid_pre", "resid_post"))
    for layer in range(1, n_layers):
        if not _same(post[layer - 1], pre[layer]):
            reason = f"what block {layer - 1} gives is not what block {layer} reads"
            refused[hook_point("resid_post", layer - 1)] = refused[hook_point("resid_pre", layer)] = reason
    if hidden is None or len(hidden) != n_layers + 1:
        return refused
    # Hidden state L is what block L reads, the last one is after the final norm. Mamba and RWKV leave out the first.
    if all(_same(*both) for both in zip(pre, hidden, strict=False)):
        return refused
    for layer in range(n_layers):
        if layer + 1 < n_layers and not _same(post[layer], hidden[layer]):
            reason = f"what block {layer} gives is not among the hidden states of the model"
            refused[hook_point("resid_post", layer)] = refused[hook_point("resid_pre", layer + 1)] = reason
    return refused


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether they are equal; also where there is none, which is not this check's to say."""
    return a is None or b is None or (a.shape == b.shape and torch.equal(a, b))


def _check_sums(
    sites: _Sites, read_inside: Callable[[], Mapping[str, Tensor]], name: str
) -> tuple[dict[str, str], str | None]:
    """(site -> why it is refused, what mlp_out is where the block adds more)."""
    pre, attn, mid, mlp, post = (sites[site] for site in SITES)
    above, below = _holds(mid, pre, attn), _holds(post, mid, mlp)
    if not above and not below and _holds(post, pre, attn, mlp):
        return ({} if mid is None else {"resid_mid": parallel(name)}), None
    refused, note = {}, None
    if above and not below and mid is not None and mlp is not None and post is not None:
        note = _more_than(mid, mlp, post, read_inside())
    if mid is not None and not above and not below:
        refused["resid_mid"] = f"{_differs('resid_mid', mid, pre, attn)}, and {_differs('resid_post', post, mid, mlp)}"
    if attn is not None and not above:
        refused["attn_out"] = _differs("resid_mid", mid, pre, attn)
    if mlp is not None and not below and note is None:
        refused["mlp_out"] = _differs("resid_post", post, mid, mlp)
    return refused, note


def _holds(total: Tensor | None, *parts: Tensor | None) -> bool:
    known = [part for part in parts if part is not None]
    return total is not None and len(known) == len(parts) and is_sum(total, *known)


def _more_than(mid: Tensor, mlp: Tensor, post: Tensor, read: Mapping[str, Tensor]) -> str | None:
    """What to say of a block that adds more after the MLP, if resid_mid + mlp_out is found in it."""
    both = mid.double() + mlp.double()
    share = float((post.double() - both).norm() / post.double().norm())
    tail = f"so that resid_post differs from resid_mid + mlp_out by {share:.2g} of its norm"
    for path, tensor in read.items():
        if is_sum(tensor, mid, mlp):
            return f"mlp_out is what the MLP adds; the block then adds more ({path} reads resid_mid + mlp_out), {tail}"
    scale = (post.double() * both).sum() / both.pow(2).sum()
    if is_sum(post, (scale * mid.double()).to(mid.dtype), (scale * mlp.double()).to(mlp.dtype)):
        return f"mlp_out is what the MLP adds; the block multiplies the sum by {float(scale):.4g}, {tail}"
    return None


def _differs(what: str, total: Tensor | None, *parts: Tensor | None) -> str:
    of = {"resid_mid": "resid_pre + attn_out", "resid_post": "resid_mid + mlp_out"}[what]
    known = [part.double() for part in parts if part is not None and total is not None and part.shape == total.shape]
    if total is None or len(known) < len(parts):
        return f"{what} cannot be held against {of}, since not all of them exist"
    difference = (total.double() - torch.stack(known).sum(0)).norm() / total.double().norm()
    return f"{what} is not {of} but differs by {float(difference):.2g} of its norm"
