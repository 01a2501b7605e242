"""The check of a model's sites finds what is wrong, and says it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.hook_points import HookPoints
from matryoshka.lm.hooks import ModuleHook
from matryoshka.lm.identities import check_sites, is_sum
from matryoshka.sites import SITES, hook_point

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
D_MODEL = 12


def parts_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A stream and two contributions, [2, 5, 12]; the second is a hundred times smaller than the stream."""
    generator = torch.Generator().manual_seed(3)
    stream, attn, mlp = torch.randn(3, 2, 5, D_MODEL, generator=generator)
    return (30 * stream).to(dtype), (5 * attn).to(dtype), (0.3 * mlp).to(dtype)


def sites_of_two_layers(dtype: torch.dtype) -> dict[str, Tensor]:
    """As a model of two blocks computes them in this dtype."""
    pre, attn, mlp = parts_of(dtype)
    seen = {}
    for layer in range(2):
        mid = pre + attn
        for site, tensor in zip(SITES, (pre, attn, mid, mlp, mid + mlp), strict=True):
            seen[hook_point(site, layer)] = tensor
        pre, attn, mlp = mid + mlp, attn.flip(-1), mlp.flip(-1)
    return seen


def refused(seen: dict[str, Tensor], hidden: list[Tensor] | None = None) -> dict[str, str]:
    return check_sites(seen, hidden, lambda _layer: {}, 2, "it").refused


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_one_up_to_rounding(dtype: torch.dtype) -> None:
    stream, attn, mlp = parts_of(dtype)
    assert is_sum(stream + attn, stream, attn)
    assert is_sum(stream + attn + mlp, stream, attn, mlp)
    assert is_sum(stream + attn * 0.22, stream, attn * 0.22)
    # one element of a contribution a hundred times smaller than the stream, off by a tenth of itself
    total = (stream + attn).double()
    changed = total.clone()
    index = int(total.abs().flatten().argmin())
    changed.flatten()[index] += 0.1 * float(attn.double().abs().flatten()[index])
    assert not is_sum(changed, stream, attn)
    assert not is_sum(stream + attn, stream, attn.roll(1, -1))
    assert not is_sum(stream + attn, stream, attn[:, :1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sites_that_are_what_they_say(dtype: torch.dtype) -> None:
    seen = sites_of_two_layers(dtype)
    hidden = [seen[hook_point("resid_pre", 0)], seen[hook_point("resid_pre", 1)], torch.zeros(2, 5, D_MODEL)]
    assert refused(seen, hidden) == {}
    without_first = [seen[hook_point("resid_post", 0)], seen[hook_point("resid_post", 1)], torch.zeros(2, 5, D_MODEL)]
    assert refused(seen, without_first) == {}  # Mamba's way


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kind_of_wrong_site_is_refused(dtype: torch.dtype) -> None:
    right = sites_of_two_layers(dtype)
    names = {site: hook_point(site, 1) for site in SITES}
    # OPT with norms after: resid_mid already holds what the MLP adds, and resid_post is its norm
    post_norm = right | {names["resid_mid"]: right[names["resid_post"]], names["resid_post"]: right[names["resid_mid"]]}
    assert set(refused(post_norm)) == {names["resid_mid"], names["attn_out"], names["mlp_out"]}
    assert "resid_mid is not resid_pre + attn_out but differs by 0." in refused(post_norm)[names["resid_mid"]]
    # a raw output in place of what is added
    assert set(refused(right | {names["mlp_out"]: 2 * right[names["mlp_out"]]})) == {names["mlp_out"]}
    assert set(refused(right | {names["attn_out"]: 2 * right[names["attn_out"]]})) == {names["attn_out"]}
    # another stream than the model's
    hidden = [right[hook_point("resid_pre", 0)], right[hook_point("resid_pre", 0)], torch.zeros(2, 5, D_MODEL)]
    assert set(refused(right, hidden)) == {hook_point("resid_post", 0), names["resid_pre"]}
    assert set(refused(right | {names["resid_pre"]: -right[names["resid_pre"]]})) >= {names["resid_pre"]}


def test_parallel_blocks_have_no_resid_mid() -> None:
    right = sites_of_two_layers(torch.float32)
    pre, attn, _, mlp, _ = (right[hook_point(site, 1)] for site in SITES)
    parallel = right | {hook_point("resid_mid", 1): pre, hook_point("resid_post", 1): pre + attn + mlp}
    found = refused(parallel | {hook_point("resid_mid", 1): pre * 1.5})
    assert set(found) == {hook_point("resid_mid", 1)}
    assert "parallel blocks" in found[hook_point("resid_mid", 1)]


def test_a_block_that_adds_more_says_what_mlp_out_is() -> None:
    right = sites_of_two_layers(torch.float32)
    mid, mlp = right[hook_point("resid_mid", 1)], right[hook_point("mlp_out", 1)]
    more = right | {hook_point("resid_post", 1): mid + mlp + mid.tanh()}
    assert set(refused(more)) == {hook_point("mlp_out", 1)}  # nobody says that it is added
    inside = {"norm": mid, "gate": mid + mlp}
    checked = check_sites(more, None, lambda _layer: inside, 2, "it")
    assert checked.refused == {}
    assert list(checked.notes) == [1]
    assert "gate reads resid_mid + mlp_out" in checked.notes[1]
    scaled = right | {hook_point("resid_post", 1): (mid + mlp) * 0.75}
    checked = check_sites(scaled, None, lambda _layer: {}, 2, "it")
    assert checked.refused == {}
    assert "multiplies the sum by 0.75, so that resid_post differs from" in checked.notes[1]


def test_a_module_that_is_not_the_site_is_refused(tiny_gemma2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP of Gemma-2 in place of the norm after it: what the name would be if TransformerLens had it wrong."""
    right = HookPoints.trace

    def trace(self: HookPoints, name: str) -> ModuleHook | None:
        return right(self, "blocks.1.mlp.hook_out" if name == "blocks.1.hook_mlp_out" else name)

    monkeypatch.setattr(HookPoints, "trace", trace)
    for dtype in ("float32", "bfloat16"):
        model = LanguageModel.load(str(tiny_gemma2), dtype=dtype, device="cpu")
        tokens = torch.randint(4, 94, (2, 9))
        with pytest.raises(
            UserError, match=r"mlp_out of layer 1 cannot be read .* resid_post is not resid_mid \+ mlp_out"
        ):
            model.capture(tokens, [hook_point("mlp_out", 1)])
        with pytest.raises(UserError, match="mlp_out of layer 1"):
            model.logits(tokens, {hook_point("mlp_out", 1): lambda t: t})
        assert model.sites_of(1) == ["resid_pre", "attn_out", "resid_mid", "resid_post"]
        assert model.sites_of(0) == list(SITES)


def test_a_forward_that_fails_is_one_paragraph(
    tiny_llama: Path, load: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    model, tokens = load("tiny_llama"), torch.arange(4, 12)[None]

    def fail(_self: Any, _x: Tensor) -> Tensor:
        raise ValueError("`get_seq_length` can only be called on\n Attention layers")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", fail)
        with pytest.raises(
            UserError, match=r"llama, a LlamaForCausalLM of transformers, failed .* on Attention layers"
        ):
            LanguageModel.load(str(tiny_llama), dtype="float32", device="cpu")
        with pytest.raises(UserError, match="failed in its own code with ValueError"):
            model.logits(tokens)
    # what a function at a hook raises is its own
    with pytest.raises(ZeroDivisionError):
        model.logits(tokens, {hook_point("mlp_out", 1): lambda t: t / (1 // 0)})
