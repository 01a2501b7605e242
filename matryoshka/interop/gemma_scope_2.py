"""Gemma Scope 2: transcoder/layer_L_width_W_l0_N/{params.safetensors, config.json} of google/gemma-scope-2-*.

The input is u (resid_mid normalised, with gain: the output of pre_feedforward_layernorm), the output what the MLP adds
to the stream. affine_skip_connection is [d_in, d_out], as our W_skip.
"""

from __future__ import annotations

import re
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.hook_names import output_hook, split_hook
from matryoshka.interop.gemma_scope import width_name
from matryoshka.interop.inputs import ExportInputs, unread_prefixes
from matryoshka.interop.weight_files import (
    WEIGHTS,
    build,
    nested_facts,
    read_json_object,
    read_safetensors,
    write_json,
    write_safetensors,
)
from matryoshka.transcoder import Transcoder, TranscoderConfig

WEIGHTS_FILE = "params.safetensors"
CONFIG_FILE = "config.json"

_SKIP = "affine_skip_connection"
_MODULES = {"in": "pre_feedforward_layernorm", "out": "post_feedforward_layernorm"}


def place(inputs: ExportInputs) -> str:
    """Folder inside the repository: loaders read the kind, layer and width from it."""
    config = inputs.transcoder.config
    layer, _ = split_hook(output_hook(config))
    affine = "_affine" if config.skip else ""
    l0 = "unknown" if config.k is None else config.k
    return f"transcoder/layer_{layer}_width_{width_name(config.d_sae)}_l0_{l0}{affine}"


def dropped(config: TranscoderConfig) -> list[str]:
    """Prefixes."""
    return unread_prefixes(config)


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write the two files; refuses what has no name among the modules of a Gemma block."""
    transcoder = inputs.transcoder
    config = transcoder.config
    layer, _ = split_hook(config.source_hook)
    if config.source_site != "resid_mid" or config.input != "mlp_in":
        raise UserError(
            f"a gemma-scope-2 transcoder reads what the MLP reads (mlp_in), this one reads {config.source_site} as "
            f"{config.input}; train with --input mlp_in, or use --format saelens"
        )
    if config.target_hook != f"blocks.{layer}.hook_mlp_out":
        raise UserError(
            f"a gemma-scope-2 transcoder predicts the mlp_out of its own layer, this one maps {config.source_hook} to "
            f"{config.target_hook}; use --format saelens"
        )
    if "gemma" not in config.model.lower():
        raise UserError(
            f"the gemma-scope-2 format names its sites by the norms around the MLP of Gemma-2 and Gemma-3, and the "
            f"model is {config.model!r}; use --format saelens"
        )
    tensors = {_their_name(name): getattr(transcoder, name) for name in WEIGHTS}
    if transcoder.W_skip is not None:
        tensors[_SKIP] = transcoder.W_skip
    content = {
        **{f"hf_hook_point_{key}": f"model.layers.{layer}.{module}.output" for key, module in _MODULES.items()},
        "width": config.d_sae,
        "model_name": config.model,
        "architecture": "jump_relu",
        "l0": config.k,
        "affine_connection": config.skip,
        "type": "transcoder",
        # Ours.
        "matryoshka_widths": list(config.prefix_ends),
        "k": config.k,
        "model_revision": config.model_revision,
    }
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, content)


def read(folder: Path) -> Transcoder:
    """Read a folder; its hf_hook_point fields say which layer, before and after which norm."""
    config = read_json_object(folder / CONFIG_FILE)
    layers = []
    for key, module in _MODULES.items():
        found = str(config.get(f"hf_hook_point_{key}"))
        match = re.fullmatch(rf"model\.layers\.(\d+)\.{module}\.output", found)
        if match is None:
            raise UserError(
                f"{folder}: hf_hook_point_{key} is {found!r}; only transcoders of an MLP can be read here, whose "
                f"hook is model.layers.N.{module}.output"
            )
        layers.append(int(match[1]))
    names = {_their_name(name): name for name in WEIGHTS} | {_SKIP: "W_skip"}
    tensors = {names.get(name, name): tensor for name, tensor in read_safetensors(folder / WEIGHTS_FILE).items()}
    d_sae = tensors["b_enc"].shape[0] if "b_enc" in tensors else 0
    facts = {
        "input": "mlp_in",
        "source_site": "resid_mid",
        "source_hook": f"blocks.{layers[0]}.hook_resid_mid",
        "target_hook": f"blocks.{layers[1]}.hook_mlp_out",
        "model": str(config.get("model_name") or ""),
        "model_revision": config.get("model_revision"),
        **nested_facts({"k": config.get("l0"), **config}, d_sae),
    }
    return build(folder, tensors, facts)


def _their_name(name: str) -> str:
    return name.replace("W_", "w_")
