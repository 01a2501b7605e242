"""SAELens 6: a folder with sae_weights.safetensors and cfg.json, for `SAE.load_from_disk` (sae_lens/saes/).

Written as jumprelu_transcoder or jumprelu_skip_transcoder, since `matryoshka_batchtopk` is a class for training that
`SAE.load_from_disk` does not know. W_skip is [d_out, d_in] there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from matryoshka.errors import UserError
from matryoshka.hook_names import InputSite, input_hook, output_hook, read_input_hook, split_hook
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
from matryoshka.sites import input_conventions
from matryoshka.transcoder import Transcoder, TranscoderConfig

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
WRITTEN_FOR = "6.54.0"
"""The version of SAELens these files are checked against; with none, or one before 6, it reads an older layout."""

_ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def place(inputs: ExportInputs) -> str:  # noqa: ARG001 -- as every format's
    """At the top: the format leaves it open."""
    return "."


def dropped(config: TranscoderConfig) -> list[str]:
    """Prefixes."""
    return unread_prefixes(config)


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write the two files into `folder`."""
    transcoder, provenance = inputs.transcoder, inputs.provenance
    config = transcoder.config
    tensors = {name: getattr(transcoder, name) for name in WEIGHTS}
    if transcoder.W_skip is not None:
        tensors["W_skip"] = transcoder.W_skip.T
    content = {
        "architecture": "jumprelu_skip_transcoder" if config.skip else "jumprelu_transcoder",
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "d_out": config.d_out,
        "dtype": str(transcoder.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        # Without it SAELens takes True, and then refuses a transcoder.
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": WRITTEN_FOR,
            "sae_lens_training_version": None,
            "model_name": config.model,
            "model_class_name": "HookedTransformer",
            "hook_name": input_hook(config),
            "hook_name_out": output_hook(config),
            "hook_head_index": None,
            "context_size": provenance.ctx_len,
            "prepend_bos": True if provenance.has_bos is None else provenance.has_bos,
            "dataset_path": provenance.dataset,
            "exclude_special_tokens": True,
            "seqpos_slice": [None],
            "neuronpedia_id": None,
            "model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": False},
            # Ours; SAELens keeps what it does not know.
            "training_architecture": "matryoshka_batchtopk_transcoder",
            "matryoshka_widths": list(config.prefix_ends),
            "k": config.k,
            "input": config.input,
            "model_revision": config.model_revision,
        },
    }
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, content)


def read(folder: Path, *, norm_kind: str | None = None) -> Transcoder:
    """Read a transcoder folder; refuses what would need scaling or subtracting that is not in the weights.

    `norm_kind`: see `read_input_hook`.
    """
    config = read_json_object(folder / CONFIG_FILE)
    if config.get("architecture") not in _ARCHITECTURES:
        raise UserError(
            f"{folder} has the SAELens architecture {config.get('architecture')!r}; transcoders are one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    for key, wanted in (
        ("apply_b_dec_to_input", False),
        ("normalize_activations", "none"),
        ("reshape_activations", "none"),
        ("activation_fn", "relu"),
    ):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{folder} has {key} = {config[key]!r}, which is not supported; fold it into the weights")
    metadata = config.get("metadata") or config
    layer, source = _source(folder, metadata, norm_kind)
    tensors = read_safetensors(folder / WEIGHTS_FILE)
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    if "threshold" not in tensors and "b_enc" in tensors:
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    d_sae = tensors["b_enc"].shape[0] if "b_enc" in tensors else 0
    facts = {
        "input": source.convention,
        "source_site": source.source_site,
        "source_hook": f"blocks.{layer}.hook_{source.source_site}",
        "target_hook": str(metadata.get("hook_name_out") or ""),
        "model": str(metadata.get("model_name") or ""),
        "model_revision": metadata.get("model_revision"),
        **nested_facts(metadata, d_sae),
    }
    return build(folder, tensors, facts)


def _source(folder: Path, metadata: dict[str, Any], norm_kind: str | None) -> tuple[int, InputSite]:
    hook, convention = str(metadata.get("hook_name")), metadata.get("input")
    try:
        layer, rest = split_hook(hook)
        # What we wrote ourselves says which of the two a LayerNorm's hook_normalized is.
        source = read_input_hook(rest, norm_kind if convention is None else None)
    except UserError as error:
        raise UserError(f"{folder} reads the hook {hook!r}: {error}") from error
    if convention is None:
        return layer, source
    if convention not in input_conventions(source.source_site):
        raise UserError(f"{folder} has the input {convention!r}, which does not exist for {hook}")
    return layer, InputSite(source.source_site, convention)
