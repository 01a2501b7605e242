"""delphi's latent cache: what every latent does on the val rows of a shard set, for automatic explanations.

    <folder>/<module>/{start}_{end}.safetensors     latents start..end, both included
        locations     [n, 3] uint16 or uint32       context, position, latent - start
        activations   [n] float16
        tokens        [contexts, ctx_len] int64
    <folder>/<module>/config.json

As delphi/latents/cache.py writes it. No language model is run: the shard set holds tokens and activations, and gives
its contexts back in order. Special positions have no activations.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.hook_names import output_hook
from matryoshka.interop.inputs import ExportInputs, lost_prefixes
from matryoshka.interop.weight_files import write_json, write_safetensors
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig

N_SPLITS = 5
"""Files the latents are cut into; delphi's own default."""
CONFIG_FILE = "config.json"

_SMALLEST = 1e-5
"""Activations up to this are none to delphi."""
_LARGEST = torch.finfo(torch.float16).max
_ROWS = 4096
"""Rows encoded at once."""


def place(inputs: ExportInputs) -> str:
    """Name of the module's folder."""
    return output_hook(inputs.transcoder.config)


def dropped(config: TranscoderConfig) -> list[str]:
    """Weights and prefixes."""
    return ["the weights: the format holds activations of latents", *lost_prefixes(config)]


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write the cache of all val contexts into `folder`; it takes rows x L0 x 16 bytes of memory on the way."""
    transcoder, shards = inputs.transcoder, inputs.shards
    if shards is None:
        raise UserError("delphi's cache is made from activations, and the run's shard set is gone; pass --shards")
    config, manifest = transcoder.config, shards.manifest
    if (config.d_in, config.source_hook) != (shards.d_in, manifest.source.hook_point):
        raise UserError(
            f"the transcoder reads {config.source_hook} of width {config.d_in}, and {shards.path} holds "
            f"{manifest.source.hook_point} of width {shards.d_in}; pass the shard set it was trained on"
        )
    tokens = torch.cat([shards.val.tokens(shard) for shard in range(shards.val.n_shards)])
    locations, activations = active_entries(transcoder, shards)
    ends = torch.linspace(0, config.d_sae, min(N_SPLITS, config.d_sae) + 1).long().tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        here = (locations[:, 2] >= start) & (locations[:, 2] < end)
        own = locations[here] - torch.tensor([0, 0, start])
        small = max(len(tokens), shards.ctx_len, end - start) <= 2**16
        write_safetensors(
            folder / f"{start}_{end - 1}.safetensors",
            {
                "locations": own.to(torch.uint16 if small else torch.uint32),
                "activations": activations[here].clamp_max(_LARGEST).half(),
                "tokens": tokens.long(),
            },
        )
    dataset = str(manifest.dataset.get("name", ""))
    content = {
        "dataset_repo": dataset,
        "dataset_split": "val",
        "dataset_name": "",
        "dataset_column": str(manifest.dataset.get("text_column", "text")),
        "batch_size": 1,
        "cache_ctx_len": shards.ctx_len,
        "ctx_len": shards.ctx_len,
        "n_tokens": tokens.numel(),
        "n_splits": N_SPLITS,
        "model_name": config.model,
    }
    write_json(folder / CONFIG_FILE, content)


def active_entries(transcoder: Transcoder, shards: ShardSet) -> tuple[Tensor, Tensor]:
    """([n, 3] int64 context, position, latent, sorted; [n] float32) of all activations on the val rows."""
    config, norm = transcoder.config, shards.norm
    found: list[tuple[Tensor, Tensor]] = []
    starts = [sum(shards.val.shard_contexts[:shard]) for shard in range(shards.val.n_shards)]
    for block in shards.val.blocks():
        positions, contexts = block.keep.nonzero(as_tuple=True)
        for rows in torch.arange(len(positions)).split(_ROWS):
            raw = block.source[positions[rows], contexts[rows]]
            x = apply_convention(raw, config.input, source_site=config.source_site, norm=norm)
            acts = transcoder.encode(x.to(transcoder.device)).cpu()
            row, latent = (acts > _SMALLEST).nonzero(as_tuple=True)
            where = rows[row]
            place = torch.stack(
                [contexts[where] + starts[block.shard], positions[where] + block.first_position, latent], dim=1
            )
            found.append((place, acts[row, latent]))
    if not found:
        raise UserError(f"{shards.path} has no val rows; harvest with a val_fraction above 0")
    locations, activations = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = (locations[:, 0] * shards.ctx_len + locations[:, 1]) * config.d_sae + locations[:, 2]
    order = order.argsort()
    return locations[order], activations[order]
