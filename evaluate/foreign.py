"""Transcoders of other projects, as contenders on a shard set. The formats are matryoshka.interop's.

gemma-scope:PATH     params.npz of google/gemma-scope-2b-pt-transcoders; PATH is the file or its folder. Reads n
                     (normalised, no gain); the file says neither model nor layer (arXiv 2408.05147, appendix B)
FOLDER               Gemma Scope 2: params.safetensors + config.json. Reads u (normalised, with gain)
FOLDER               SAELens: sae_weights.safetensors + cfg.json. Reads what metadata.hook_name says
"""

from __future__ import annotations

from pathlib import Path

from matryoshka.interop import gemma_scope, gemma_scope_2, saelens
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

GEMMA_SCOPE = "gemma-scope:"

is_gemma_scope_2 = gemma_scope_2.is_here
is_saelens = saelens.is_here


def load_gemma_scope(path: Path, shards: ShardSet) -> Transcoder:
    """Read params.npz. Its layer is taken from a folder `layer_N` in the path, else to be the shard set's."""
    return _named(gemma_scope.read(path, layer=shards.manifest.source.layer), shards)


def load_gemma_scope_2(folder: Path, shards: ShardSet) -> Transcoder:
    """Read a Gemma Scope 2 folder; its hf_hook_point fields say which layer, before and after which norm."""
    return _named(gemma_scope_2.read(folder), shards)


def load_saelens(folder: Path, shards: ShardSet) -> Transcoder:
    """Read a SAELens transcoder folder; refuses what would need scaling or subtracting that is not in the weights."""
    return _named(saelens.read(folder, norm_kind=None if shards.norm is None else shards.norm.kind), shards)


def _named(transcoder: Transcoder, shards: ShardSet) -> Transcoder:
    """`transcoder` under the shard set's name of its model: others write gemma-2-2b for google/gemma-2-2b."""
    own, theirs = str(shards.manifest.model.get("model", "")), transcoder.config.model
    if not theirs or _last(theirs) == _last(own):
        transcoder.config = transcoder.config.model_copy(update={"model": own})
    return transcoder


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
