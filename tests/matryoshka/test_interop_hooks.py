"""The hook we name gives what the transcoder reads, in every kind of block; and a spliced model runs on the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.hook_names import InputSite, input_hook, output_hook, read_input_hook, split_hook
from matryoshka.lm import LanguageModel
from matryoshka.lm.splice import check_model, spliced_between
from matryoshka.norms import apply_convention
from matryoshka.sites import input_conventions
from matryoshka.transcoder import Transcoder

LAYER = 1
MODELS = ["tiny_gpt2", "tiny_llama", "tiny_gemma2", "tiny_gemma3"]
NORMS = {"tiny_gpt2": "layer"}

Make = Callable[..., Transcoder]


def tokens(n_contexts: int = 2, ctx_len: int = 11) -> Tensor:
    return torch.randint(4, 90, (n_contexts, ctx_len), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(make_transcoder: Make) -> Make:
    """A function (width, input convention, source site, fields of the config) -> a transcoder."""

    def of_width(d: int, convention: str, site: str = "resid_mid", **changes: Any) -> Transcoder:
        content = {
            "d_in": d,
            "d_out": d,
            "group_sizes": (7, 20),
            "input": convention,
            "source_site": site,
            "source_hook": f"blocks.{LAYER}.hook_{site}",
            "target_hook": f"blocks.{LAYER}.hook_{'mlp_out' if site == 'resid_mid' else 'attn_out'}",
            "model": "",
        }
        return make_transcoder(seed=1, scale=0.3, **(content | changes))

    return of_width


def reads(model: LanguageModel, transcoder: Transcoder) -> Tensor:
    """What the transcoder reads, derived from the raw source as the shard set does it."""
    config = transcoder.config
    raw = model.capture(tokens(), [config.source_hook])[config.source_hook]
    norm = model.norm_before(config.source_site, LAYER)
    return apply_convention(raw, config.input, source_site=config.source_site, norm=norm)


@pytest.mark.parametrize("site", ["resid_mid", "resid_pre"])
@pytest.mark.parametrize("name", MODELS)
def test_the_named_hook_gives_what_is_read(
    make: Make,
    name: str,
    site: str,
    load: Callable[[str], LanguageModel],
    boot_bridge: Callable[[Path], Any],
    request: pytest.FixtureRequest,
) -> None:
    """The names are TransformerLens's: its own forward says what they give."""
    model = load(name)
    with torch.inference_mode():
        _, cache = boot_bridge(request.getfixturevalue(name)).run_with_cache(tokens())
    seen = []
    for convention in input_conventions(site):
        transcoder = make(model.d_model, convention, site)
        hook = input_hook(transcoder.config)
        given = cache[hook]
        torch.testing.assert_close(given, reads(model, transcoder), atol=2e-5, rtol=2e-4)
        assert all((given - other).norm() > 0.1 * given.norm() for other in seen)
        seen.append(given)
        layer, rest = split_hook(hook)
        assert (layer, read_input_hook(rest)) == (LAYER, InputSite(site, convention))
        assert output_hook(transcoder.config) == transcoder.config.target_hook


def test_gemma3_is_a_sandwich(load: Callable[[str], LanguageModel], tiny_gemma3: Path) -> None:
    """mlp_out is what is added to the stream, after the post-norm; the gain of the pre-norm is 1 + weight."""
    from safetensors.torch import load_file

    model = load("tiny_gemma3")
    names = [f"blocks.{LAYER}.hook_{site}" for site in ("resid_mid", "mlp_out", "resid_post")]
    mid, mlp, post = model.capture(tokens(), names).values()
    torch.testing.assert_close(mid + mlp, post)
    weights = load_file(tiny_gemma3 / "model.safetensors")
    norm = model.norm_before("resid_mid", LAYER)
    assert norm is not None
    assert norm.kind == "rms"
    assert torch.equal(norm.gain, 1 + weights[f"model.layers.{LAYER}.pre_feedforward_layernorm.weight"])


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("name", MODELS)
def test_spliced_logits(make: Make, name: str, convention: str, load: Callable[[str], LanguageModel]) -> None:
    """The splice is the same as replacing the target by a reconstruction that was computed before."""
    model = load(name)
    transcoder = make(model.d_model, convention, skip=True)
    x = reads(model, transcoder)
    y_hat = transcoder(x.reshape(-1, model.d_model), 1).view_as(x)
    expected = model.logits(tokens(), {transcoder.config.target_hook: lambda _: y_hat})
    clean = model.logits(tokens())
    with transcoder.spliced_into(model, n_groups=1):
        spliced = model.logits(tokens())
        target = transcoder.config.target_hook
        torch.testing.assert_close(model.capture(tokens(), [target])[target], y_hat, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spliced, expected, atol=1e-4, rtol=1e-4)
    assert (spliced - clean).norm() > 0.01 * clean.norm()
    assert torch.equal(model.logits(tokens()), clean)  # and afterwards it is as before


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("name", MODELS)
def test_spliced_into_a_transformer_bridge(
    make: Make,
    name: str,
    convention: str,
    load: Callable[[str], LanguageModel],
    boot_bridge: Callable[[Path], Any],
    request: pytest.FixtureRequest,
) -> None:
    model = load(name)
    transcoder = make(model.d_model, convention)
    with transcoder.spliced_into(model):
        expected = model.logits(tokens())
    bridge = boot_bridge(request.getfixturevalue(name))
    with torch.inference_mode():
        with transcoder.spliced_into(bridge):
            got = bridge(tokens())
        after = bridge(tokens())
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (after - got).norm() > 0.01 * after.norm()


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("name", MODELS)
def test_spliced_between_the_modules_of_a_plain_model(
    make: Make, name: str, convention: str, load: Callable[[str], LanguageModel], request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float32).eval()
    if name == "tiny_gpt2":
        block = plain.transformer.h[LAYER]
        source, target = block.ln_2, block.mlp
    else:
        block = plain.model.layers[LAYER]
        gemma = "gemma" in name
        source = block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm
        target = block.post_feedforward_layernorm if gemma else block.mlp
    model = load(name)
    transcoder = make(model.d_model, convention)
    with transcoder.spliced_into(model):
        expected = model.logits(tokens())
    with torch.no_grad():
        clean = plain(tokens()).logits
        with spliced_between(transcoder, source, target):
            got = plain(tokens()).logits
        assert torch.equal(plain(tokens()).logits, clean)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_splice_that_fails_is_taken_out_again(make: Make, load: Callable[[str], LanguageModel]) -> None:
    model = load("tiny_llama")
    clean = model.logits(tokens())
    transcoder = make(model.d_model, "normalized")
    with pytest.raises(ZeroDivisionError), transcoder.spliced_into(model):
        _ = 1 / 0
    assert torch.equal(model.logits(tokens()), clean)


@pytest.mark.parametrize(
    ("d", "changes", "message"),
    [
        (12, {}, "reads 12 dimensions and .* has 24"),
        (24, {"source_hook": "blocks.9.hook_resid_mid", "target_hook": "blocks.9.hook_mlp_out"}, "no layer 9"),
        (24, {"source_hook": ""}, "does not say where it belongs"),
        (24, {"input": "attn_in"}, "does not exist"),
    ],
)
def test_a_transcoder_of_another_model_is_refused(
    make: Make, d: int, changes: dict[str, Any], message: str, load: Callable[[str], LanguageModel]
) -> None:
    model = load("tiny_llama")
    transcoder = make(d, "normalized", **changes)
    with pytest.raises(UserError, match=message), transcoder.spliced_into(model):
        pass


def test_names_of_the_hub_are_compared(
    make: Make, load: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("tiny_llama")
    monkeypatch.setattr(model, "name", "meta-llama/Llama-3.2-1B")
    check_model(make(24, "normalized", model="unsloth/Llama-3.2-1B"), model)
    with pytest.raises(UserError, match=r"trained on google/gemma-2-2b, and this model is meta-llama/Llama-3\.2-1B"):
        check_model(make(24, "normalized", model="google/gemma-2-2b"), model)


def test_weights_decide_before_names(make: Make, load: Callable[[str], LanguageModel]) -> None:
    model = load("tiny_llama")
    check_model(make(24, "normalized", model="nobody/else", model_digest=model.weights_digest), model)
    with pytest.raises(UserError, match="was trained on other weights than those of"):
        check_model(make(24, "normalized", model=model.name, model_digest="0" * 64), model)


def test_a_model_without_the_norm_is_refused(make: Make, tiny_olmo2: Path) -> None:
    model = LanguageModel.load(str(tiny_olmo2), dtype="float32", device="cpu")
    with pytest.raises(UserError, match="has no norm there"), make(24, "normalized").spliced_into(model):
        pass


def test_other_objects_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="cannot be spliced into a Linear"):
        make(24, "normalized").spliced_into(torch.nn.Linear(2, 3))


def test_hooks_that_cannot_be_derived_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be told"):
        read_input_hook("hook_mlp_in")
    with pytest.raises(UserError, match="What can be is"):
        read_input_hook("attn.hook_z")
