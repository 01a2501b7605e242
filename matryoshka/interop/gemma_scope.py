"""Gemma Scope: layer_L/width_W/average_l0_N/params.npz of google/gemma-scope-2b-pt-transcoders (arXiv 2408.05147).

The file holds five float32 arrays and says neither model nor sites: the input is always n (resid_mid normalised, no
gain), the output what the MLP adds to the stream. The path names the layer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.hook_names import output_hook, split_hook
from matryoshka.interop.inputs import ExportInputs, lost_prefixes
from matryoshka.interop.weight_files import WEIGHTS, build, read_npz, write_npz
from matryoshka.transcoder import Transcoder, TranscoderConfig

FILE = "params.npz"


def place(inputs: ExportInputs) -> str:
    """Folder inside the repository: loaders read layer and width from it."""
    config = inputs.transcoder.config
    layer, _ = split_hook(output_hook(config))
    return f"layer_{layer}/width_{width_name(config.d_sae)}/canonical"


def width_name(d_sae: int) -> str:
    """16384 -> 16k; a width that is no multiple of 1024 is written out."""
    return f"{d_sae // 1024}k" if d_sae % 1024 == 0 else str(d_sae)


def dropped(config: TranscoderConfig) -> list[str]:
    """Prefixes, k and the model."""
    k = [] if config.k is None else [f"k = {config.k}"]
    model = f"the model {config.model or 'of unknown name'} and its revision; the layer is in the folder's name"
    return [*lost_prefixes(config), *k, model]


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write params.npz; refuses what five arrays without a word cannot express."""
    transcoder, provenance = inputs.transcoder, inputs.provenance
    config = transcoder.config
    layer, _ = split_hook(config.source_hook)
    if config.skip:
        raise UserError(
            "the gemma-scope format (params.npz) has no skip connection and this transcoder has one; "
            "use --format saelens or gemma-scope-2"
        )
    if config.input != "normalized" or config.source_site != "resid_mid":
        raise UserError(
            f"a gemma-scope transcoder reads the normalised resid_mid, this one reads {config.source_site} as "
            f"{config.input}; train with --input normalized, or use --format saelens"
        )
    if config.target_hook != f"blocks.{layer}.hook_mlp_out":
        raise UserError(
            f"a gemma-scope transcoder predicts the mlp_out of its own layer, this one maps {config.source_hook} to "
            f"{config.target_hook}; use --format saelens"
        )
    if provenance.norm_kind == "layer":
        raise UserError("a gemma-scope transcoder reads behind an RMSNorm, this model has a LayerNorm; use saelens")
    write_npz(folder / FILE, {name: getattr(transcoder, name) for name in WEIGHTS})


def read(path: Path, *, layer: int | None = None, model: str = "") -> Transcoder:
    """Read params.npz, given as the file or its folder.

    Args:
        layer: taken when the path has no folder `layer_N`.
        model: the file does not say it.
    """
    file = path / FILE if path.is_dir() else path
    tensors = read_npz(file)
    found = [int(match[1]) for part in file.parts if (match := re.fullmatch(r"layer_(\d+)", part))]
    layer = found[-1] if found else layer
    facts: dict[str, Any] = {
        "input": "normalized",
        "source_site": "resid_mid",
        "source_hook": "" if layer is None else f"blocks.{layer}.hook_resid_mid",
        "target_hook": "" if layer is None else f"blocks.{layer}.hook_mlp_out",
        "model": model,
    }
    means = [int(match[1]) for part in file.parts if (match := re.fullmatch(r"average_l0_(\d+)", part))]
    d_sae = tensors["b_enc"].shape[0] if "b_enc" in tensors else 0
    if means and 1 <= means[-1] <= d_sae:
        facts["k"] = means[-1]
    return build(file, tensors, facts)
