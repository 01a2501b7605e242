"""circuit-tracer: a transcoder set, config.yaml + layer_0.safetensors ... layer_{n-1}.safetensors, one for each MLP.

W_enc is [d_transcoder, d_model] there and W_skip [d_model, d_model] with y += x @ W_skip.T. Its JumpReLU is
pre * (pre > threshold) without a relu, so thresholds below 0 are written as 0, which is the same function as ours.
The loader wants every layer of the model and one width for all: layers without a transcoder become zeros, whose whole
MLP output circuit-tracer then shows as an error node (circuit_tracer/transcoder/single_layer_transcoder.py).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.hook_names import check_output_hook, input_hook, output_hook, read_input_hook, split_hook
from matryoshka.interop.inputs import ExportInputs, unread_prefixes
from matryoshka.interop.weight_files import build, nested_facts, read_safetensors, write_safetensors
from matryoshka.transcoder import Transcoder, TranscoderConfig

CONFIG_FILE = "config.yaml"
LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")

_THRESHOLD = "activation_function.threshold"
_ACTIVATIONS = (None, "relu", "jumprelu")
"""What `activation` may be: circuit-tracer takes the thresholds that a file has, but for relu and topk."""
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", _THRESHOLD, "W_skip")


def place(inputs: ExportInputs) -> str:  # noqa: ARG001 -- as every format's
    """At the top: the format leaves it open."""
    return "."


def dropped(config: TranscoderConfig) -> list[str]:
    """Prefixes."""
    return unread_prefixes(config)


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write a whole set from transcoders of different layers of one model; the other layers are zeros."""
    import yaml

    transcoders, provenance = inputs.transcoders, inputs.provenance
    by_layer = {_layer(transcoder): transcoder for transcoder in transcoders}
    if len(by_layer) < len(transcoders):
        raise UserError("two of the transcoders are of the same layer; a circuit-tracer set has one for each layer")
    first = transcoders[0]
    n_layers = provenance.n_layers
    if n_layers is None:
        raise UserError(
            "a circuit-tracer set has a file for every layer of the model, and their number is unknown (the "
            "run's shard set is not there any more); pass --n-layers"
        )
    if max(by_layer) >= n_layers:
        raise UserError(f"there is a transcoder of layer {max(by_layer)}, but the model has {n_layers} layers")
    shared = {_shared(transcoder) for transcoder in transcoders}
    if len(shared) > 1:
        raise UserError(
            "the transcoders of a circuit-tracer set must agree in width, latents, skip, input and model; found "
            + " and ".join(str(facts) for facts in sorted(shared))
        )
    config = first.config
    padding: Path | None = None
    for layer in range(n_layers):
        file = folder / f"layer_{layer}.safetensors"
        if layer in by_layer:
            write_safetensors(file, _tensors(by_layer[layer]))
        elif padding is None:
            write_safetensors(file, {name: torch.zeros_like(t).bfloat16() for name, t in _tensors(first).items()})
            padding = file
        else:
            _link(padding, file)
    content = {
        "model_name": config.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": split_hook(input_hook(config))[1],
        "feature_output_hook": split_hook(output_hook(config))[1],
        "scan": provenance.run or "matryoshka",
        # Ours; circuit-tracer does not look at them.
        "trained_layers": sorted(by_layer),
        "matryoshka_widths": list(config.prefix_ends),
        "k": config.k,
        "model_revision": config.model_revision,
    }
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def read(folder: Path, *, layer: int | None = None, norm_kind: str | None = None) -> Transcoder:
    """Read one layer of a set; without `layer` it must be plain which one is meant.

    `norm_kind`: see `read_input_hook`.
    """
    config = _read_config(folder / CONFIG_FILE)
    layers = sorted(int(match[1]) for path in folder.iterdir() if (match := LAYER_FILE.fullmatch(path.name)))
    trained = config.get("trained_layers")
    candidates = [layer for layer in trained if layer in layers] if isinstance(trained, list) else layers
    if layer is None and len(candidates) == 1:
        layer = candidates[0]
    if layer is None or layer not in layers:
        wanted = "name one of them as layer" if layer is None else f"layer {layer} is not among them"
        raise UserError(f"{folder} is a circuit-tracer set with the layers {', '.join(map(str, candidates))}; {wanted}")
    hook = str(config.get("feature_input_hook"))
    target = str(config.get("feature_output_hook"))
    try:
        source = read_input_hook(hook, norm_kind)
    except UserError as error:
        raise UserError(f"{folder} reads the hook {hook!r}: {error}") from error
    try:
        check_output_hook(target)
    except UserError as error:
        raise UserError(f"{folder} predicts the hook {target!r}: {error}") from error
    file = folder / f"layer_{layer}.safetensors"
    facts = {
        "input": source.convention,
        "source_site": source.source_site,
        "source_hook": f"blocks.{layer}.hook_{source.source_site}",
        "target_hook": f"blocks.{layer}.{target}",
        "model": str(config.get("model_name") or ""),
        "model_revision": config.get("model_revision"),
    }
    tensors = _read_layer(file)
    if config.get("activation") == "relu" and bool(tensors["threshold"].any()):
        raise UserError(
            f"{folder} says activation: relu, with which circuit-tracer has no thresholds, and {file.name} has some; "
            "correct one of them (jumprelu takes thresholds)"
        )
    return build(file, tensors, {**facts, **nested_facts(config, len(tensors["b_enc"]))})


def _layer(transcoder: Transcoder) -> int:
    config = transcoder.config
    layer, _ = split_hook(config.source_hook)
    if config.d_in != config.d_out:
        raise UserError(
            f"circuit-tracer supports transcoders of one width, this one maps {config.d_in} dimensions to "
            f"{config.d_out}; use --format saelens"
        )
    if config.source_site != "resid_mid" or config.target_hook != f"blocks.{layer}.hook_mlp_out":
        raise UserError(
            f"circuit-tracer replaces the MLP of a layer (resid_mid -> mlp_out), this one maps {config.source_hook} to "
            f"{config.target_hook}; use --format saelens"
        )
    return layer


def _shared(transcoder: Transcoder) -> tuple[int, int, bool, str, str]:
    config = transcoder.config
    return (config.d_in, config.d_sae, config.skip, config.input, config.model)


def _tensors(transcoder: Transcoder) -> dict[str, Tensor]:
    tensors = {
        "W_enc": transcoder.W_enc.T,
        "b_enc": transcoder.b_enc,
        "W_dec": transcoder.W_dec,
        "b_dec": transcoder.b_dec,
        _THRESHOLD: transcoder.threshold.clamp_min(0.0),
    }
    if transcoder.W_skip is not None:
        tensors["W_skip"] = transcoder.W_skip.T
    return tensors


def _link(source: Path, target: Path) -> None:
    """The same zeros for each layer without a transcoder; at d = 2304 and 18,432 latents they are 170 MB."""
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or content.get("model_kind") != "transcoder_set":
        kind = content.get("model_kind") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has the model_kind {kind!r}; only a transcoder_set can be read, layer by layer")
    activation = content.get("activation")
    if activation not in _ACTIVATIONS or "transcoders" in content:
        what = "a list of files elsewhere" if "transcoders" in content else f"the activation {activation}"
        raise UserError(
            f"{path} has {what}, which is not supported; only ReLU and JumpReLU in files named layer_N.safetensors are"
        )
    return content


def _read_layer(file: Path) -> dict[str, Tensor]:
    tensors = read_safetensors(file)
    unknown = sorted(set(tensors) - set(_TENSORS))
    missing = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in tensors]
    if unknown or missing or tensors["W_enc"].ndim != 2:
        raise UserError(f"{file} holds the tensors {', '.join(sorted(tensors))}; expected {', '.join(_TENSORS)}")
    threshold = tensors.pop(_THRESHOLD, torch.zeros(()))
    if threshold.ndim > 1 or threshold.numel() not in (1, len(tensors["b_enc"])):
        raise UserError(f"{file} has a threshold of shape {list(threshold.shape)}, not one for each latent or for all")
    if bool((threshold < 0).any()):
        raise UserError(f"{file} has thresholds below 0, with which circuit-tracer lets negative activations through")
    tensors["threshold"] = threshold.reshape(-1).expand(len(tensors["b_enc"])).contiguous()
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    return tensors
