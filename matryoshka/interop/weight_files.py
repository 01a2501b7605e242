"""Reading and writing the tensors of foreign formats. Safetensors and npz without objects, nothing else."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.transcoder import Transcoder, TranscoderConfig

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises UserError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous copies on the CPU."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an uncompressed or compressed npz; one that would have to be unpickled is refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as Gemma Scope's params.npz: {error}") from error


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32 arrays; equal tensors give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}
    np.savez(path, **arrays)


def read_json_object(path: Path) -> dict[str, Any]:
    """A foreign JSON file. Raises UserError when it is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Equal content gives equal bytes. NaN is refused."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=True)
    path.write_text(text + "\n", encoding="utf-8")


def build(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Transcoder:
    """Our form of foreign weights, which are already named and oriented as ours; `path` is for messages.

    `facts` are fields of TranscoderConfig. A foreign transcoder has no groups and says no k: one group of all its
    latents, and k unknown, unless `facts` knows better.
    """
    missing = [name for name in WEIGHTS if name not in tensors]
    if missing or tensors["W_enc"].ndim != 2 or tensors["W_dec"].ndim != 2:
        raise UserError(f"{path} holds the arrays {', '.join(sorted(tensors))}; expected {', '.join(WEIGHTS)}")
    d_in, d_sae = tensors["W_enc"].shape
    content = {"group_sizes": (d_sae,), "k": None, **facts}
    transcoder = Transcoder(
        TranscoderConfig(d_in=d_in, d_out=tensors["W_dec"].shape[1], skip="W_skip" in tensors, **content)
    )
    try:
        transcoder.set_weights(dict(tensors))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return transcoder


def nested_facts(found: Mapping[str, Any], d_sae: int) -> dict[str, Any]:
    """group_sizes and k from what a foreign config says of them, where that is consistent; else nothing.

    `matryoshka_widths` are the prefix ends, as SAELens writes them; `k` is ours.
    """
    facts: dict[str, Any] = {}
    ends = found.get("matryoshka_widths")
    if isinstance(ends, list) and ends and all(type(end) is int for end in ends) and ends[-1] == d_sae:
        sizes = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        if min(sizes) > 0:
            facts["group_sizes"] = sizes
    k = found.get("k")
    if type(k) is int and 1 <= k <= d_sae:
        facts["k"] = k
    return facts
