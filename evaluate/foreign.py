"""Transcoders of other projects, read into ours with the input convention that each was trained for.

    gemma-scope:PATH     params.npz of google/gemma-scope-2b-pt-transcoders; PATH is the file or its folder. Reads n
                         (normalised, no gain); the file says neither model nor layer (arXiv 2408.05147, appendix B)
    FOLDER               Gemma Scope 2: params.safetensors + config.json. Reads u (normalised, with gain)
    FOLDER               SAELens: sae_weights.safetensors + cfg.json. Reads what metadata.hook_name says

All are JumpReLU (or ReLU: threshold 0) with pre_acts = x @ W_enc + b_enc and y_hat = acts @ W_dec + b_dec
(+ x @ W_skip), b_dec never subtracted from the input. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig

GEMMA_SCOPE = "gemma-scope:"
GEMMA_SCOPE_FILE = "params.npz"
GEMMA_SCOPE_2_FILES = ("params.safetensors", "config.json")
SAELENS_FILES = ("sae_weights.safetensors", "cfg.json")

_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SAELENS_ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def is_gemma_scope_2(folder: Path) -> bool:
    """Whether `folder` has the files of a Gemma Scope 2 transcoder."""
    return all((folder / name).is_file() for name in GEMMA_SCOPE_2_FILES)


def is_saelens(folder: Path) -> bool:
    """Whether `folder` has the files of a SAELens transcoder."""
    return all((folder / name).is_file() for name in SAELENS_FILES)


def load_gemma_scope(path: Path, shards: ShardSet) -> Transcoder:
    """Read params.npz. Its layer is taken from a folder `layer_N` in the path, else to be the shard set's."""
    file = path / GEMMA_SCOPE_FILE if path.is_dir() else path
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as Gemma Scope's params.npz: {error}") from error
    layers = [int(match[1]) for part in file.parts if (match := re.fullmatch(r"layer_(\d+)", part))]
    layer = layers[-1] if layers else shards.manifest.source.layer
    return _transcoder(file, tensors, shards, source=_resid_mid(layer), target=_mlp_out(layer), input="normalized")


def load_gemma_scope_2(folder: Path, shards: ShardSet) -> Transcoder:
    """Read a Gemma Scope 2 folder; its hf_hook_point fields say which layer, before and after which norm."""
    config = _read_json(folder / GEMMA_SCOPE_2_FILES[1])
    layers = []
    for key, module in (("in", "pre_feedforward_layernorm"), ("out", "post_feedforward_layernorm")):
        found = str(config.get(f"hf_hook_point_{key}"))
        match = re.fullmatch(rf"model\.layers\.(\d+)\.{module}\.output", found)
        if match is None:
            raise UserError(
                f"{folder}: hf_hook_point_{key} is {found!r}; only transcoders of an MLP can be compared here, whose "
                f"hook is model.layers.N.{module}.output"
            )
        layers.append(int(match[1]))
    tensors = _read_safetensors(folder / GEMMA_SCOPE_2_FILES[0])
    names = {name.lower(): name for name in _WEIGHTS} | {"affine_skip_connection": "W_skip"}
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    return _transcoder(
        folder,
        tensors,
        shards,
        source=_resid_mid(layers[0]),
        target=_mlp_out(layers[1]),
        input="mlp_in",
        model=config.get("model_name"),
    )


def load_saelens(folder: Path, shards: ShardSet) -> Transcoder:
    """Read a SAELens transcoder folder; refuses what would need scaling or subtracting that is not in the weights."""
    config = _read_json(folder / SAELENS_FILES[1])
    if config.get("architecture") not in _SAELENS_ARCHITECTURES:
        raise UserError(
            f"{folder} has the SAELens architecture {config.get('architecture')!r}; transcoders are one of "
            f"{', '.join(_SAELENS_ARCHITECTURES)}"
        )
    for key, wanted in (("apply_b_dec_to_input", False), ("normalize_activations", "none")):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{folder} has {key} = {config[key]!r}, which is not supported; fold it into the weights")
    metadata = config.get("metadata") or {}
    source, convention = _saelens_source(folder, str(metadata.get("hook_name")), shards)
    tensors = _read_safetensors(folder / SAELENS_FILES[0])
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()  # SAELens keeps it as [d_out, d_in]
    if "threshold" not in tensors and "b_enc" in tensors:
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    return _transcoder(
        folder,
        tensors,
        shards,
        source=source,
        target=str(metadata.get("hook_name_out")),
        input=convention,
        model=metadata.get("model_name"),
    )


def _saelens_source(folder: Path, hook: str, shards: ShardSet) -> tuple[str, str]:
    """(source hook, input convention) of a TransformerLens hook name."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    layer, rest = (int(match[1]), match[2]) if match is not None else (-1, "")
    norm = shards.norm
    # hook_normalized lies before the gain of an RMSNorm, but after gain and bias of a LayerNorm.
    normalized = "mlp_in" if norm is not None and norm.kind == "layer" else "normalized"
    conventions = {
        "hook_resid_mid": "resid_mid",
        "ln2.hook_normalized": normalized,
        "ln2.hook_out": "mlp_in",
        "mlp.hook_in": "mlp_in",
    }
    if rest not in conventions:
        more = (
            "; it means the residual in TransformerLens but the MLP's input in some releases, so that it cannot be told"
            if rest == "hook_mlp_in"
            else ""
        )
        known = ", ".join(f"blocks.N.{name}" for name in conventions)
        raise UserError(f"{folder} reads the hook {hook!r}{more}. What can be derived from stored rows is {known}")
    return _resid_mid(layer), conventions[rest]


def _transcoder(
    path: Path,
    tensors: dict[str, Tensor],
    shards: ShardSet,
    *,
    source: str,
    target: str,
    input: str,  # noqa: A002 -- the name of the config key
    model: Any = None,
) -> Transcoder:
    """Our form of foreign weights [d_in, d_sae] and so on. It has no k: k = d_sae stands for "as many as pass"."""
    missing = [name for name in _WEIGHTS if name not in tensors]
    if missing or tensors["W_enc"].ndim != 2 or tensors["W_dec"].ndim != 2:
        raise UserError(f"{path} holds the arrays {', '.join(sorted(tensors))}; expected {', '.join(_WEIGHTS)}")
    d_in, d_sae = tensors["W_enc"].shape
    manifest = shards.manifest
    own_model = str(manifest.model.get("model", ""))
    config = TranscoderConfig(
        d_in=d_in,
        d_out=tensors["W_dec"].shape[1],
        group_sizes=(d_sae,),
        k=d_sae,
        skip="W_skip" in tensors,
        input=input,
        source_site="resid_mid",
        source_hook=source,
        target_hook=target,
        # Others write gemma-2-2b where the hub name is google/gemma-2-2b.
        model=own_model if model is None or _last(str(model)) == _last(own_model) else str(model),
    )
    transcoder = Transcoder(config)
    try:
        transcoder.set_weights(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return transcoder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def _resid_mid(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_mid"


def _mlp_out(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
