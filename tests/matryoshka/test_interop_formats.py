"""Gemma Scope, Gemma Scope 2 and circuit-tracer: what is in the files, by a naive forward in numpy, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from matryoshka.errors import UserError
from matryoshka.interop.export import export
from matryoshka.interop.provenance import Provenance
from matryoshka.transcoder import Transcoder

GROUPS = (5, 11, 32)
ENDS = (5, 16, 48)

Make = Callable[..., Transcoder]


@pytest.fixture
def make(make_transcoder: Make) -> Make:
    return partial(make_transcoder, seed=3, group_sizes=GROUPS)


def rows(n: int = 7) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(5))


def naive(x: np.ndarray, W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any, threshold: Any, skip: Any = None) -> Any:
    """JumpReLU forward in float64, one row and one latent at a time; W_enc [d_in, d_sae], skip [d_in, d_out]."""
    y = []
    for row in x.astype(np.float64):
        out = b_dec.astype(np.float64) + (0 if skip is None else row @ skip)
        for latent in range(len(b_enc)):
            pre = sum(row[i] * W_enc[i, latent] for i in range(len(row))) + b_enc[latent]
            if pre > threshold[latent]:
                out = out + max(pre, 0) * W_dec[latent]
        y.append(out)
    return np.array(y)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected).max() > 0.5


def same_weights(a: Transcoder, b: Transcoder) -> None:
    names = [name for name, _ in a.named_parameters()]
    assert names == [name for name, _ in b.named_parameters()]
    for name in names:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# --- Gemma Scope ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_gemma_scope(make: Make, tmp_path: Path, n_groups: int) -> None:
    transcoder, x = make(), rows()
    exported = export([transcoder.prefix(n_groups)], "gemma-scope", tmp_path / "out")
    file = tmp_path / "out" / "layer_3" / f"width_{ENDS[n_groups - 1]}" / "canonical" / "params.npz"
    assert exported.weights == file.parent
    with np.load(file, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    assert {name: array.dtype.name for name, array in found.items()} == dict.fromkeys(
        ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), "float32"
    )
    close(transcoder(x, n_groups), naive(x.numpy(), **found))


def test_gemma_scope_comes_back(make: Make, tmp_path: Path) -> None:
    exported = export([make()], "gemma-scope", tmp_path / "gemma-scope-2b-pt-transcoders")
    for place in (tmp_path / "gemma-scope-2b-pt-transcoders", exported.weights, exported.weights / "params.npz"):
        again = Transcoder.from_pretrained(place)
        same_weights(make(), again)
        # the file knows neither groups nor k; layer and model stand in the path
        expected = make().config.model_copy(update={"group_sizes": (48,), "k": None})
        assert again.config == expected
    record = json.loads((tmp_path / "gemma-scope-2b-pt-transcoders" / "export.json").read_text())
    assert record["dropped"] == list(exported.dropped)
    assert [line.partition(" ")[0] for line in exported.dropped] == ["the", "k", "the"]  # groups, k, model
    export([again], "gemma-scope", tmp_path / "again")
    assert (tmp_path / "again" / "layer_3" / "width_48" / "canonical" / "params.npz").read_bytes() == (
        exported.weights / "params.npz"
    ).read_bytes()


def test_gemma_scope_from_the_path_of_a_release(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "layer_7" / "width_16k" / "average_l0_13"
    folder.mkdir(parents=True)
    weights = {name: p.numpy() for name, p in make().named_parameters()}
    arrays: dict[str, Any] = weights
    np.savez(folder / "params.npz", **arrays)
    config = Transcoder.from_pretrained(tmp_path).config
    assert (config.source_hook, config.target_hook, config.k, config.model) == (
        "blocks.7.hook_resid_mid",
        "blocks.7.hook_mlp_out",
        13,
        "",
    )
    np.savez(tmp_path / "params.npz", **arrays)
    assert Transcoder.from_pretrained(tmp_path / "params.npz", layer=2).config.source_hook == "blocks.2.hook_resid_mid"
    assert Transcoder.from_pretrained(tmp_path / "params.npz").config.source_hook == ""


def test_gemma_scope_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", allow_pickle=True, W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        Transcoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": True}, "no skip connection"),
        ({"input": "mlp_in"}, "reads the normalised resid_mid, this one reads resid_mid as mlp_in"),
        ({"target_hook": "blocks.4.hook_mlp_out"}, "its own layer"),
    ],
)
def test_what_gemma_scope_cannot_say_is_refused(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export([make(**changes)], "gemma-scope", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_gemma_scope_is_for_rms_norms(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LayerNorm"):
        export([make()], "gemma-scope", tmp_path / "out", Provenance(norm_kind="layer"))


# --- Gemma Scope 2 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n_groups", [1, 3])
def test_gemma_scope_2(make: Make, tmp_path: Path, skip: bool, n_groups: int) -> None:
    transcoder, x = make(input="mlp_in", skip=skip), rows()
    exported = export([transcoder.prefix(n_groups)], "gemma-scope-2", tmp_path / "out")
    affine = "_affine" if skip else ""
    assert exported.weights == tmp_path / f"out/transcoder/layer_3_width_{ENDS[n_groups - 1]}_l0_4{affine}"
    found = load_file(exported.weights / "params.safetensors")
    W_skip = found.pop("affine_skip_connection", None)
    assert (W_skip is not None) == skip
    expected = naive(
        x.numpy(), found["w_enc"], found["b_enc"], found["w_dec"], found["b_dec"], found["threshold"], W_skip
    )
    close(transcoder(x, n_groups), expected)
    config = json.loads((exported.weights / "config.json").read_text())
    published = {
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "width": ENDS[n_groups - 1],
        "model_name": "google/gemma-2-2b",
        "architecture": "jump_relu",
        "l0": 4,
        "affine_connection": skip,
        "type": "transcoder",
    }
    assert published.items() <= config.items()
    again = Transcoder.from_pretrained(tmp_path / "out")
    same_weights(transcoder.prefix(n_groups), again)
    assert again.config == transcoder.prefix(n_groups).config


def test_a_published_gemma_scope_2_comes_back_unchanged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w_enc": (12, 20), "b_enc": (20,), "w_dec": (20, 10), "b_dec": (10,), "threshold": (20,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(weights, folder / "params.safetensors")
    # As google/gemma-scope-2-12b-it has it.
    content = {
        "hf_hook_point_in": "model.layers.12.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.12.post_feedforward_layernorm.output",
        "width": 20,
        "model_name": "google/gemma-3-12b-it",
        "architecture": "jump_relu",
        "l0": 7,
        "affine_connection": False,
        "type": "transcoder",
    }
    (folder / "config.json").write_text(json.dumps(content))
    ours = Transcoder.from_pretrained(folder)
    assert (ours.config.input, ours.config.k, ours.config.model) == ("mlp_in", 7, "google/gemma-3-12b-it")
    again = export([ours], "gemma-scope-2", tmp_path / "again").weights
    assert content.items() <= json.loads((again / "config.json").read_text()).items()
    written = load_file(again / "params.safetensors")
    assert written.keys() == weights.keys()
    assert all(np.array_equal(written[name], weights[name]) for name in weights)
    (folder / "config.json").write_text(json.dumps({**content, "hf_hook_point_in": "model.layers.12.output"}))
    with pytest.raises(UserError, match="only transcoders of an MLP"):
        Transcoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "normalized"}, "train with --input mlp_in"),
        ({"input": "mlp_in", "model": "meta-llama/Llama-3.2-1B"}, "Gemma-2 and Gemma-3"),
        ({"input": "mlp_in", "target_hook": "blocks.3.hook_resid_post"}, "predicts the mlp_out"),
    ],
)
def test_what_gemma_scope_2_cannot_say_is_refused(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export([make(**changes)], "gemma-scope-2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- circuit-tracer ---------------------------------------------------------------------------------------------


@pytest.fixture
def square(make: Make) -> Make:
    def of_layer(layer: int = 3, **changes: Any) -> Transcoder:
        hooks = {"source_hook": f"blocks.{layer}.hook_resid_mid", "target_hook": f"blocks.{layer}.hook_mlp_out"}
        return make(**{"d_out": 12, **hooks, **changes})

    return of_layer


def circuit_tracer_forward(x: np.ndarray, found: dict[str, Any]) -> np.ndarray:
    """As SingleLayerTranscoder computes it: pre * (pre > threshold), without a relu."""
    pre = x.astype(np.float64) @ found["W_enc"].T + found["b_enc"]
    y = (pre * (pre > found["activation_function.threshold"])) @ found["W_dec"] + found["b_dec"]
    return y + (x @ found["W_skip"].T if "W_skip" in found else 0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n_groups", [1, 3])
def test_circuit_tracer(square: Make, tmp_path: Path, skip: bool, n_groups: int) -> None:
    transcoder, x = square(skip=skip), rows()
    assert bool((transcoder.threshold < 0).any())  # which must not let negative activations through
    export([transcoder.prefix(n_groups)], "circuit-tracer", tmp_path / "out", Provenance(n_layers=6, run="l3"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"layer_{i}.safetensors" for i in range(6)]
    end = ENDS[n_groups - 1]
    for i in range(6):
        found = load_torch(tmp_path / "out" / f"layer_{i}.safetensors")
        names = {"W_enc", "b_enc", "W_dec", "b_dec", "activation_function.threshold", *(["W_skip"] if skip else [])}
        assert found.keys() == names
        assert found["W_enc"].shape == found["W_dec"].shape == (end, 12)
        y = circuit_tracer_forward(x.numpy(), found)
        if i == 3:
            close(transcoder(x, n_groups), y)
        else:
            assert not y.any()
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    expected = {
        "model_name": "google/gemma-2-2b",
        "model_kind": "transcoder_set",
        "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
        "scan": "l3",
    }
    assert expected.items() <= config.items()
    assert "transcoders" not in config


def load_torch(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(file).items()}


def test_a_set_of_several_layers(square: Make, tmp_path: Path) -> None:
    one, four = square(layer=1, seed=1), square(layer=4, seed=4)
    export([four, one], "circuit-tracer", tmp_path / "out", Provenance(n_layers=5))
    with pytest.raises(UserError, match="the layers 1, 4; name one of them as layer"):
        Transcoder.from_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="layer 9 is not among them"):
        Transcoder.from_pretrained(tmp_path / "out", layer=9)
    again = Transcoder.from_pretrained(tmp_path / "out", layer=4)
    assert again.config == four.config
    # the same function; thresholds below 0 are 0 there
    torch.testing.assert_close(again(rows()), four(rows()), atol=0, rtol=0)
    assert torch.equal(again.threshold, four.threshold.clamp_min(0))
    export(
        [again, Transcoder.from_pretrained(tmp_path / "out", layer=1)], "circuit-tracer", tmp_path / "again", PROVENANCE
    )
    for i in range(5):
        name = f"layer_{i}.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    # layers without a transcoder are one file of zeros
    assert os.stat(tmp_path / "out" / "layer_0.safetensors").st_nlink == 3


PROVENANCE = Provenance(n_layers=5)


def test_sets_of_others(tmp_path: Path) -> None:
    """ReLU without a threshold, and one threshold for all latents, as other authors write them."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (20, 12), "b_enc": (20,), "W_dec": (20, 12), "b_dec": (12,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "layer_0.safetensors")
    save_file(
        {**weights, "activation_function.threshold": np.array([0.5], np.float32)}, tmp_path / "layer_1.safetensors"
    )
    content = {
        "model_name": "meta-llama/Llama-3.2-1B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    x = rows()
    for layer, threshold in ((0, 0.0), (1, 0.5)):
        for activation in ({}, {"activation": "jumprelu" if threshold else "relu"}):
            (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, **activation}))
            ours = Transcoder.from_pretrained(tmp_path, layer=layer)
            assert (ours.config.input, ours.config.source_hook) == ("mlp_in", f"blocks.{layer}.hook_resid_mid")
            close(ours(x), circuit_tracer_forward(x.numpy(), {**weights, "activation_function.threshold": threshold}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "topk", "k": 64}, "activation topk"),
        ({"activation": "gelu"}, "activation gelu"),
        ({"activation": "relu"}, "says activation: relu, .* layer_3.safetensors has some"),
        (
            {"feature_output_hook": "hook_resid_post"},
            "predicts the hook 'hook_resid_post': .* not the output of an MLP",
        ),
        ({"feature_output_hook": None}, "predicts the hook 'None'"),
        ({"transcoders": ["hf://a/b/c"]}, "list of files elsewhere"),
        ({"model_kind": "cross_layer_transcoder"}, "only a transcoder_set"),
        ({"feature_input_hook": "hook_mlp_in"}, "cannot be told"),
    ],
)
def test_sets_that_cannot_be_read_are_refused(
    square: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    export([square()], "circuit-tracer", tmp_path / "out", Provenance(n_layers=4))
    file = tmp_path / "out" / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        Transcoder.from_pretrained(tmp_path / "out")


def test_thresholds_below_zero_and_strange_tensors_are_refused(square: Make, tmp_path: Path) -> None:
    export([square()], "circuit-tracer", tmp_path / "out", Provenance(n_layers=4))
    file = tmp_path / "out" / "layer_3.safetensors"
    weights = load_file(file)
    save_file({**weights, "activation_function.threshold": np.full(48, -0.1, np.float32)}, file)
    with pytest.raises(UserError, match="below 0"):
        Transcoder.from_pretrained(tmp_path / "out")
    save_file({**weights, "activation_function.threshold": np.zeros(3, np.float32)}, file)
    with pytest.raises(UserError, match="threshold of shape"):
        Transcoder.from_pretrained(tmp_path / "out")
    save_file({**weights, "k": np.zeros(1, np.int64)}, file)
    with pytest.raises(UserError, match="holds the tensors"):
        Transcoder.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "provenance", "message"),
    [
        ([{"d_out": 10}], Provenance(n_layers=9), "maps 12 dimensions to 10"),
        ([{}], Provenance(), "pass --n-layers"),
        ([{}], Provenance(n_layers=3), "layer 3, but the model has 3 layers"),
        ([{}, {}], Provenance(n_layers=9), "of the same layer"),
        ([{}, {"input": "mlp_in", "layer": 1}], Provenance(n_layers=9), "must agree"),
        ([{"target_hook": "blocks.4.hook_mlp_out"}], Provenance(n_layers=9), "replaces the MLP of a layer"),
    ],
)
def test_what_circuit_tracer_cannot_say_is_refused(
    square: Make, tmp_path: Path, changes: list[dict[str, Any]], provenance: Provenance, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export([square(**each) for each in changes], "circuit-tracer", tmp_path / "out", provenance)
    assert list(tmp_path.iterdir()) == []
