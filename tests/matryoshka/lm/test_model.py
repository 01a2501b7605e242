"""Captured activations against plain torch hooks on a separately loaded Hugging Face model."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.norms import Norm, apply_convention
from matryoshka.sites import SITES, hook_point

MODELS = ("tiny_gemma2", "tiny_llama", "tiny_gpt2")
# site -> (module of the block, "in" or "out"), written down from transformers' modeling files.
BLOCK = ("", "in"), ("", "out")
EDGES = {
    "tiny_gemma2": {
        "resid_pre": BLOCK[0],
        "attn_out": ("post_attention_layernorm", "out"),
        "resid_mid": ("pre_feedforward_layernorm", "in"),
        "mlp_out": ("post_feedforward_layernorm", "out"),
        "resid_post": BLOCK[1],
        "attn_norm": ("input_layernorm", "out"),
        "mlp_norm": ("pre_feedforward_layernorm", "out"),
        "raw_mlp_out": ("mlp", "out"),
    },
    "tiny_llama": {
        "resid_pre": BLOCK[0],
        "attn_out": ("self_attn", "out"),
        "resid_mid": ("post_attention_layernorm", "in"),
        "mlp_out": ("mlp", "out"),
        "resid_post": BLOCK[1],
        "attn_norm": ("input_layernorm", "out"),
        "mlp_norm": ("post_attention_layernorm", "out"),
    },
    "tiny_gpt2": {
        "resid_pre": BLOCK[0],
        "attn_out": ("attn", "out"),
        "resid_mid": ("ln_2", "in"),
        "mlp_out": ("mlp", "out"),
        "resid_post": BLOCK[1],
        "attn_norm": ("ln_1", "out"),
        "mlp_norm": ("ln_2", "out"),
    },
}
LAYERS = (0, 1, 2)
ALL_POINTS = [hook_point(site, layer) for layer in LAYERS for site in SITES]


def plain_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def by_plain_hooks(folder, name, tokens, dtype=torch.float32):
    """(what, layer) -> tensor, and the logits, from one ordinary forward of a plain model."""
    model = plain_model(folder, dtype)
    blocks = model.transformer.h if name == "tiny_gpt2" else model.model.layers
    seen = {}
    for layer in LAYERS:
        for what, (path, edge) in EDGES[name].items():
            module = blocks[layer].get_submodule(path)

            def keep(tensor, key):
                seen[key] = (tensor[0] if isinstance(tensor, tuple) else tensor).clone()

            if edge == "in":
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, key=(what, layer), keep=keep: keep(
                        args[0] if args else kwargs["hidden_states"], key
                    ),
                    with_kwargs=True,
                )
            else:
                module.register_forward_hook(lambda _m, _a, out, key=(what, layer), keep=keep: keep(out, key))
    return seen, model(tokens).logits


def tokens_of(n_contexts=3, ctx_len=29, n_tokens=94, seed=0):
    tokens = torch.randint(4, n_tokens, (n_contexts, ctx_len), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 2
    return tokens


@contextlib.contextmanager
def counted_modules():
    """Count the calls of every module, by class name, wherever it lives."""
    calls = collections.Counter()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _args: calls.update([type(module).__name__])
    )
    try:
        yield calls
    finally:
        handle.remove()


# --- what is captured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_bit_equal_to_hugging_face(name, dtype, load, request):
    tokens = tokens_of()
    expected, _ = by_plain_hooks(request.getfixturevalue(name), name, tokens, getattr(torch, dtype))
    model = load(name, dtype)
    captured = model.capture(tokens, ALL_POINTS)
    assert list(captured) == ALL_POINTS
    for layer in LAYERS:
        for site in SITES:
            got = captured[hook_point(site, layer)]
            assert got.shape == (3, 29, model.d_model)
            assert got.dtype == getattr(torch, dtype)
            assert torch.equal(got, expected[site, layer]), (site, layer)
        mid, post = expected["resid_mid", layer], expected["resid_post", layer]
        assert torch.equal(mid + captured[hook_point("mlp_out", layer)], post)
    tensors = list(captured.values())
    different = [a for i, a in enumerate(tensors) if not any(torch.equal(a, b) for b in tensors[:i])]
    assert len(different) == len(tensors) - 2  # resid_post is resid_pre of the next layer


def test_mlp_out_of_gemma2_is_after_the_post_norm(load, tiny_gemma2):
    tokens = tokens_of()
    expected, _ = by_plain_hooks(tiny_gemma2, "tiny_gemma2", tokens)
    got = load("tiny_gemma2").capture(tokens, [hook_point("mlp_out", 1)])[hook_point("mlp_out", 1)]
    assert torch.equal(got, expected["mlp_out", 1])
    assert (got - expected["raw_mlp_out", 1]).norm() > 0.1 * got.norm()


@pytest.mark.parametrize("name", MODELS)
def test_one_site_alone_equals_the_same_site_among_all(name, load):
    model, tokens = load(name), tokens_of()
    together = model.capture(tokens, ALL_POINTS)
    for point in ALL_POINTS:
        assert torch.equal(model.capture(tokens, [point])[point], together[point])


@pytest.mark.parametrize("name", MODELS)
def test_a_split_batch_gives_the_same(name, load):
    model, tokens = load(name), tokens_of(5)
    whole = model.capture(tokens, ALL_POINTS)
    parts = [model.capture(part, ALL_POINTS) for part in (tokens[:2], tokens[2:])]
    for point in ALL_POINTS:
        torch.testing.assert_close(whole[point], torch.cat([p[point] for p in parts]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "block"),
    [("tiny_gemma2", "Gemma2DecoderLayer"), ("tiny_llama", "LlamaDecoderLayer"), ("tiny_gpt2", "GPT2Block")],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_forward_stops_after_the_deepest_layer(name, block, layer, load):
    model, tokens = load(name), tokens_of()
    points = [hook_point("resid_mid", 0), hook_point("mlp_out", layer)]
    model.capture(tokens, points)
    with counted_modules() as calls:
        model.capture(tokens, points)
    assert calls[block] == layer + 1
    final_norms = {"tiny_gemma2": 4, "tiny_llama": 2, "tiny_gpt2": 2}[name] * (layer + 1)
    assert calls["Gemma2RMSNorm"] + calls["LlamaRMSNorm"] + calls["LayerNorm"] == final_norms
    with counted_modules() as calls:
        model.logits(tokens)
    assert calls[block] == model.n_layers


def test_capture_changes_nothing_and_its_tensors_are_free(load):
    model, tokens = load("tiny_gemma2"), tokens_of()
    points = [hook_point("resid_post", 0), hook_point("resid_pre", 1), hook_point("resid_mid", 1)]
    first = model.capture(tokens, points)
    assert torch.equal(tokens, tokens_of())
    before = {point: tensor.clone() for point, tensor in first.items()}
    assert torch.equal(first[points[0]], first[points[1]])
    assert not any(t.is_inference() or t.requires_grad for t in first.values())
    first[points[0]].zero_()
    assert torch.equal(first[points[1]], before[points[1]])
    again = model.capture(tokens, points)
    assert all(torch.equal(again[point], before[point]) for point in points)
    weight = torch.ones(model.d_model, requires_grad=True)
    (again[points[2]] @ weight).sum().backward()
    assert weight.grad is not None


# --- the norm and the conventions -------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_mid", "resid_pre"])
@pytest.mark.parametrize("name", MODELS)
def test_conventions_equal_what_the_norm_module_gives(name, site, load, request):
    tokens = tokens_of()
    expected, _ = by_plain_hooks(request.getfixturevalue(name), name, tokens)
    model = load(name)
    sublayer = {"resid_mid": "mlp", "resid_pre": "attn"}[site]
    for layer in LAYERS:
        norm = model.norm_before(site, layer)
        assert isinstance(norm, Norm)
        assert (norm.kind, norm.bias is None) == {"tiny_gpt2": ("layer", False)}.get(name, ("rms", True))
        assert norm.gain.dtype == torch.float32
        r = model.capture(tokens, [hook_point(site, layer)])[hook_point(site, layer)]
        u = apply_convention(r, f"{sublayer}_in", source_site=site, norm=norm)
        torch.testing.assert_close(u, expected[f"{sublayer}_norm", layer], atol=1e-6, rtol=1e-6)
        n = apply_convention(r, "normalized", source_site=site, norm=norm)
        centred = r - r.mean(-1, keepdim=True) if name == "tiny_gpt2" else r
        by_hand = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        torch.testing.assert_close(n, by_hand, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["tiny_gemma2", "tiny_llama"])
def test_normalized_equals_transformer_lens(name, load, boot_bridge, request):
    model, tokens, bridge = load(name), tokens_of(), boot_bridge(request.getfixturevalue(name))
    _, cache = bridge.run_with_cache(tokens)
    for layer in LAYERS:
        residual, normalized = hook_point("resid_mid", layer), f"blocks.{layer}.ln2.hook_normalized"
        n = apply_convention(
            model.capture(tokens, [residual])[residual],
            "normalized",
            source_site="resid_mid",
            norm=model.norm_before("resid_mid", layer),
        )
        torch.testing.assert_close(n, cache[normalized], atol=1e-5, rtol=1e-5)


def test_gain_is_one_plus_the_weight_only_for_gemma(load, tiny_gemma2, tiny_llama):
    gemma = load_file(tiny_gemma2 / "model.safetensors")["model.layers.1.pre_feedforward_layernorm.weight"]
    llama = load_file(tiny_llama / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    assert torch.equal(load("tiny_gemma2").norm_before("resid_mid", 1).gain, 1 + gemma)
    assert torch.equal(load("tiny_llama").norm_before("resid_mid", 1).gain, llama)
    assert torch.equal(load("tiny_gemma2", "bfloat16").norm_before("resid_mid", 1).gain, 1 + gemma.bfloat16().float())


def test_eps_is_the_modules_own(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.03125}))
    assert LanguageModel.load(str(folder), dtype="float32").norm_before("resid_mid", 1).eps == 0.03125


def test_other_sites_have_no_norm(load):
    model = load("tiny_gemma2")
    assert [model.norm_before(site, 1) for site in ("attn_out", "mlp_out", "resid_post")] == [None] * 3
    with pytest.raises(UserError, match="3 layers"):
        model.norm_before("resid_mid", 3)


# --- logits and replacement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_hugging_faces(name, load, request):
    tokens = tokens_of()
    _, expected = by_plain_hooks(request.getfixturevalue(name), name, tokens)
    assert torch.equal(load(name).logits(tokens), expected)


@pytest.mark.parametrize("name", MODELS)
def test_replaced_activations_are_used(name, load):
    model, tokens = load(name), tokens_of()
    clean = model.logits(tokens)
    other = model.capture(tokens_of(seed=1), ALL_POINTS)
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        point = hook_point(site, 1)
        assert torch.equal(model.logits(tokens, {point: lambda t: t.clone()}), clean), site
        changed = model.logits(tokens, {point: lambda _t, new=other[point]: new})
        assert not torch.allclose(changed, clean), site
        if site.startswith("resid"):
            assert torch.equal(changed, model.logits(tokens_of(seed=1))), site
    assert torch.equal(model.logits(tokens), clean)  # nothing stays attached


def test_replacing_both_outputs_of_a_block_by_zero_skips_it(load):
    model, tokens = load("tiny_gemma2"), tokens_of()
    skip = {hook_point(site, 1): torch.zeros_like for site in ("attn_out", "mlp_out")}
    block_input = {}
    model.logits(tokens, {hook_point("resid_pre", 1): lambda t: block_input.update(t=t.clone()) or t})
    model.logits(tokens, skip | {hook_point("resid_pre", 2): lambda t: block_input.update(after=t.clone()) or t})
    assert torch.equal(block_input["t"], block_input["after"])


def test_a_replacement_may_have_another_dtype(load):
    model, tokens = load("tiny_gemma2", "bfloat16"), tokens_of()
    replaced = model.logits(tokens, {hook_point("mlp_out", 1): lambda t: t.float()})
    assert torch.equal(replaced, model.logits(tokens))


def test_resid_mid_is_not_replaced(load):
    with pytest.raises(UserError, match="resid_mid cannot be replaced"):
        load("tiny_gemma2").logits(tokens_of(), {hook_point("resid_mid", 1): lambda t: t})


# --- loading ----------------------------------------------------------------------------------------------------


def test_loading_leaves_nothing_behind_and_prints_nothing(tiny_llama, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    before = list(warnings.filters), list(logging.root.handlers), transformers_logging.get_verbosity()
    grad_enabled = torch.is_grad_enabled()
    model = LanguageModel.load(str(tiny_llama), dtype="float32", device="cpu")
    model.capture(tokens_of(), ALL_POINTS)
    assert before == (list(warnings.filters), list(logging.root.handlers), transformers_logging.get_verbosity())
    assert transformers_logging.is_progress_bar_enabled()
    assert torch.is_grad_enabled() == grad_enabled
    assert capfd.readouterr() == ("", "")


# --- what a user can get wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("blocks.3.hook_resid_mid", "no layer 3: .* has 3 layers, 0 to 2"),
        ("blocks.1.hook_resid_middle", "resid_pre, attn_out, resid_mid, mlp_out, resid_post"),
        ("resid_mid", "each layer from 0 to 2"),
        ("blocks.x.hook_resid_mid", "each layer from 0 to 2"),
    ],
)
def test_unknown_hook_points_are_answered_with_what_exists(point, message, load):
    with pytest.raises(UserError, match=message):
        load("tiny_gemma2").capture(tokens_of(), [hook_point("resid_mid", 0), point])
    with pytest.raises(UserError, match=message):
        load("tiny_gemma2").logits(tokens_of(), {point: lambda t: t})


def test_unusable_tokens_are_refused(load):
    model, points = load("tiny_gemma2"), [hook_point("resid_mid", 0)]
    for tokens, message in (
        (tokens_of(1, 65), "65 tokens, and .* at most 64"),
        (tokens_of()[0], r"\[29\] in int64"),
        (tokens_of().int(), "in int32"),
        (tokens_of()[:0], r"\[0, 29\]"),
        (tokens_of() + 97, "0 to 96"),
        (tokens_of() - 9, "-7 to"),
    ):
        with pytest.raises(UserError, match=message):
            model.capture(tokens, points)
        with pytest.raises(UserError, match=message):
            model.logits(tokens)
