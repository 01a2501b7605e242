"""Files written here in the published formats, and the forward of each computed by hand from the raw rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluate.subject.subjects import Subject, load_subject
from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

D_SAE = 21
GEMMA_SCOPE_2 = {
    "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output",
    "width": D_SAE,
    "model_name": "google/gemma-2-2b",
    "architecture": "jump_relu",
    "affine_connection": True,
}
SAELENS = {
    "architecture": "jumprelu_transcoder",
    "d_in": 12,
    "d_sae": D_SAE,
    "d_out": 10,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.1.ln2.hook_normalized",
        "hook_name_out": "blocks.1.hook_mlp_out",
    },
}


@pytest.fixture
def weights(made: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (12, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, 10), "b_dec": (10,), "skip": (12, 10)}
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert (made.d_in, made.d_out) == (12, 10)
    return {**values, "threshold": rng.uniform(0.1, 1.5, D_SAE).astype(np.float32)}


def tensors(weights: dict[str, np.ndarray], **renamed: str) -> dict[str, torch.Tensor]:
    return {own: torch.from_numpy(weights[name].copy()) for own, name in renamed.items()}


def by_hand(weights: dict[str, np.ndarray], x: np.ndarray, *, skip: bool, relu: bool = False) -> np.ndarray:
    """JumpReLU forward, one row and one latent at a time."""
    y = []
    for row in x:
        out = weights["b_dec"].astype(np.float64) + (row @ weights["skip"] if skip else 0)
        for latent in range(D_SAE):
            pre = row @ weights["W_enc"][:, latent] + weights["b_enc"][latent]
            if pre > (0 if relu else weights["threshold"][latent]):
                out = out + pre * weights["W_dec"][latent]
        y.append(out)
    return np.array(y)


def raw_rows(made: Any, shards: ShardSet) -> tuple[np.ndarray, np.ndarray]:
    """The first stored rows of resid_mid, and the gain of the norm."""
    return made.kept_rows(shards, 7)["source"].double().numpy(), made.norm().gain.double().numpy()


def forward(subject: Subject, made: Any, shards: ShardSet) -> np.ndarray:
    raw = made.kept_rows(shards, 7)["source"]
    x = apply_convention(raw, subject.transcoder.config.input, source_site="resid_mid", norm=shards.norm)
    return subject.transcoder(x).double().numpy()


def normalized(r: np.ndarray) -> np.ndarray:
    return r / np.sqrt((r**2).mean(1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("as_folder", [True, False])
def test_gemma_scope(val_set: ShardSet, made: Any, weights: dict[str, Any], tmp_path: Path, as_folder: bool) -> None:
    folder = tmp_path / "layer_1" / "width_16k" / "average_l0_12"
    folder.mkdir(parents=True)
    file = folder / "params.npz"
    np.savez(file, **{name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")})
    subject = load_subject(f"gemma-scope:{folder if as_folder else file}", val_set)
    assert subject.name == "gemma-scope:layer_1/width_16k/average_l0_12"
    raw, _ = raw_rows(made, val_set)
    got = forward(subject, made, val_set)
    np.testing.assert_allclose(got, by_hand(weights, normalized(raw), skip=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["gemma-scope:", ""])
def test_what_from_pretrained_opens_is_compared(
    val_set: ShardSet, weights: dict[str, Any], tmp_path: Path, prefix: str
) -> None:
    """A download of the hub: the one transcoder is some folders below the one that is named."""
    folder = tmp_path / "snapshot" / "layer_1" / "width_16k" / "average_l0_12"
    folder.mkdir(parents=True)
    arrays = {name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    np.savez(folder / "params.npz", **arrays)
    subject = load_subject(f"{prefix}{tmp_path / 'snapshot'}", val_set)
    assert subject.name == "gemma-scope:layer_1/width_16k/average_l0_12"
    twin = Transcoder.from_pretrained(tmp_path / "snapshot")
    assert torch.equal(subject.transcoder.W_enc, twin.W_enc)
    (folder.parent / "average_l0_31").mkdir()
    np.savez(folder.parent / "average_l0_31" / "params.npz", **arrays)
    with pytest.raises(UserError, match="holds 2 transcoders; name one of them"):
        load_subject(f"{prefix}{tmp_path / 'snapshot'}", val_set)


def test_gemma_scope_of_another_layer_is_refused(val_set: ShardSet, weights: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "layer_2" / "width_16k"
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz", **{name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    )
    with pytest.raises(UserError, match=r"blocks\.2\.hook_resid_mid' against 'blocks\.1\.hook_resid_mid"):
        load_subject(f"gemma-scope:{folder}", val_set)


def test_gemma_scope_never_unpickles(val_set: ShardSet, weights: dict[str, Any], tmp_path: Path) -> None:
    arrays = {name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    np.savez(tmp_path / "params.npz", allow_pickle=True, threshold=np.array([{"a": 1}], dtype=object), **arrays)
    with pytest.raises(UserError, match="cannot be read"):
        load_subject(str(tmp_path), val_set)
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(UserError, match="expected W_enc, b_enc, W_dec, b_dec, threshold"):
        load_subject(str(tmp_path), val_set)
    (tmp_path / "params.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        load_subject(str(tmp_path), val_set)


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2(val_set: ShardSet, made: Any, weights: dict[str, Any], tmp_path: Path, skip: bool) -> None:
    folder = tmp_path / "layer_1_width_16k_l0_small"
    folder.mkdir()
    names = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
    save_file(
        tensors(weights, **names, **({"affine_skip_connection": "skip"} if skip else {})), folder / "params.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(GEMMA_SCOPE_2))
    subject = load_subject(str(folder), val_set)
    raw, gain = raw_rows(made, val_set)
    got = forward(subject, made, val_set)
    np.testing.assert_allclose(got, by_hand(weights, normalized(raw) * gain, skip=skip), rtol=1e-4, atol=1e-4)
    (folder / "config.json").write_text(json.dumps({**GEMMA_SCOPE_2, "hf_hook_point_in": "model.layers.1.output"}))
    with pytest.raises(UserError, match="only transcoders of an MLP"):
        load_subject(str(folder), val_set)


@pytest.mark.parametrize(
    ("hook", "convention"),
    [("ln2.hook_normalized", "normalized"), ("hook_resid_mid", "resid_mid"), ("mlp.hook_in", "mlp_in")],
)
@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_saelens(
    val_set: ShardSet, made: Any, weights: dict[str, Any], tmp_path: Path, hook: str, convention: str, architecture: str
) -> None:
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    if architecture == "transcoder":
        del names["threshold"]
    content = tensors(weights, **names)
    skip = "skip" in architecture
    if skip:
        content["W_skip"] = torch.from_numpy(weights["skip"].T.copy())
    save_file(content, tmp_path / "sae_weights.safetensors")
    metadata = {**SAELENS["metadata"], "hook_name": f"blocks.1.{hook}"}
    (tmp_path / "cfg.json").write_text(json.dumps({**SAELENS, "architecture": architecture, "metadata": metadata}))
    subject = load_subject(str(tmp_path), val_set)
    raw, gain = raw_rows(made, val_set)
    x = {"resid_mid": raw, "normalized": normalized(raw), "mlp_in": normalized(raw) * gain}[convention]
    twin = by_hand(weights, x, skip=skip, relu=architecture == "transcoder")
    np.testing.assert_allclose(forward(subject, made, val_set), twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "standard"}, "transcoders are one of"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input = True"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_in"}}, "cannot be told"),
        ({"metadata": {}}, "reads the hook 'None'"),
    ],
)
def test_saelens_refusals(
    val_set: ShardSet, weights: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    save_file(tensors(weights, **names), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({**SAELENS, **change}))
    with pytest.raises(UserError, match=message):
        load_subject(str(tmp_path), val_set)


def test_saelens_of_another_model_is_refused(val_set: ShardSet, weights: dict[str, Any], tmp_path: Path) -> None:
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    save_file(tensors(weights, **names), tmp_path / "sae_weights.safetensors")
    metadata = {**SAELENS["metadata"], "model_name": "gpt2-small"}
    (tmp_path / "cfg.json").write_text(json.dumps({**SAELENS, "metadata": metadata}))
    with pytest.raises(UserError, match="'gpt2-small' against 'google/gemma-2-2b'"):
        load_subject(str(tmp_path), val_set)


@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer(val_set: ShardSet, made: Any, weights: dict[str, Any], tmp_path: Path, skip: bool) -> None:
    """A set as it is published: W_enc and W_skip transposed, a file a layer, layer 0 without a transcoder."""
    names = {"b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "activation_function.threshold": "threshold"}
    content = tensors(weights, **names)
    content["W_enc"] = torch.from_numpy(weights["W_enc"].T.copy())
    if skip:
        content["W_skip"] = torch.from_numpy(weights["skip"].T.copy())
    folder = tmp_path / "set"
    folder.mkdir()
    save_file(content, folder / "layer_1.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in content.items()}, folder / "layer_0.safetensors")
    (folder / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\nfeature_input_hook: ln2.hook_normalized\n"
        "feature_output_hook: hook_mlp_out\n"
    )
    subject = load_subject(str(folder), val_set)
    assert subject.name == "set"
    raw, _ = raw_rows(made, val_set)
    got = forward(subject, made, val_set)
    np.testing.assert_allclose(got, by_hand(weights, normalized(raw), skip=skip), rtol=1e-4, atol=1e-4)
    (folder / "layer_1.safetensors").write_bytes((folder / "layer_0.safetensors").read_bytes())
    with pytest.raises(UserError, match="the circuit-tracer transcoder .* is empty for layer 1"):
        load_subject(str(folder), val_set)
    (folder / "layer_1.safetensors").unlink()
    with pytest.raises(UserError, match="layer 1 is not among them"):
        load_subject(str(folder), val_set)


@pytest.mark.parametrize(
    ("architecture", "is_same"), [("LlamaForCausalLM", True), ("Gemma2ForCausalLM", False), (None, False)]
)
@pytest.mark.parametrize("form", ["circuit-tracer", "saelens"])
def test_the_output_of_the_mlp_itself(
    made: Any, weights: dict[str, Any], tmp_path: Path, form: str, architecture: str | None, is_same: bool
) -> None:
    """`mlp.hook_out` is what a Llama block adds; in Gemma-2 a norm comes between, and of others nobody knows."""
    shards = made.shards(tmp_path / "set", architecture=architecture)
    folder = tmp_path / "theirs"
    folder.mkdir()
    names = {name: name for name in ("b_enc", "W_dec", "b_dec")}
    if form == "saelens":
        save_file(tensors(weights, W_enc="W_enc", threshold="threshold", **names), folder / "sae_weights.safetensors")
        metadata = {**SAELENS["metadata"], "hook_name_out": "blocks.1.mlp.hook_out"}
        (folder / "cfg.json").write_text(json.dumps({**SAELENS, "metadata": metadata}))
    else:
        content = tensors(weights, **names, **{"activation_function.threshold": "threshold"})
        content["W_enc"] = torch.from_numpy(weights["W_enc"].T.copy())
        save_file(content, folder / "layer_1.safetensors")
        (folder / "config.yaml").write_text(
            "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\nfeature_input_hook: ln2.hook_normalized\n"
            "feature_output_hook: mlp.hook_out\nactivation: jumprelu\n"
        )
    if not is_same:
        with pytest.raises(
            UserError, match=r"target site 'blocks\.1\.mlp\.hook_out' against 'blocks\.1\.hook_mlp_out'"
        ):
            load_subject(str(folder), shards)
        return
    subject = load_subject(str(folder), shards)
    assert subject.transcoder.config.target_hook == "blocks.1.hook_mlp_out"
    raw, _ = raw_rows(made, shards)
    got = forward(subject, made, shards)
    np.testing.assert_allclose(got, by_hand(weights, normalized(raw), skip=False), rtol=1e-4, atol=1e-4)
