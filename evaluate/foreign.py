"""Transcoders of other projects, as contenders on a shard set. The formats are matryoshka.interop's.

gemma-scope:PATH     params.npz of google/gemma-scope-2b-pt-transcoders; PATH is the file or its folder. Reads n
                     (normalised, no gain); the file says neither model nor layer (arXiv 2408.05147, appendix B)
FOLDER               Gemma Scope 2: params.safetensors + config.json. Reads u (normalised, with gain)
FOLDER               circuit-tracer: config.yaml + layer_N.safetensors, of which the shard set's layer is read
FOLDER               SAELens: sae_weights.safetensors + cfg.json. Reads what metadata.hook_name says
"""

from __future__ import annotations

from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.interop import circuit_tracer, gemma_scope, gemma_scope_2, saelens
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

GEMMA_SCOPE = "gemma-scope:"

is_gemma_scope_2 = gemma_scope_2.is_here
is_saelens = saelens.is_here


def is_circuit_tracer(folder: Path) -> bool:
    """Whether `folder` has the files of a transcoder set."""
    return folder.is_dir() and circuit_tracer.is_here(folder)


def load_gemma_scope(path: Path, shards: ShardSet) -> Transcoder:
    """Read params.npz. Its layer is taken from a folder `layer_N` in the path, else to be the shard set's."""
    return _named(gemma_scope.read(path, layer=shards.manifest.source.layer), shards)


def load_gemma_scope_2(folder: Path, shards: ShardSet) -> Transcoder:
    """Read a Gemma Scope 2 folder; its hf_hook_point fields say which layer, before and after which norm."""
    return _named(gemma_scope_2.read(folder), shards)


def load_saelens(folder: Path, shards: ShardSet) -> Transcoder:
    """Read a SAELens transcoder folder; refuses what would need scaling or subtracting that is not in the weights."""
    return _named(saelens.read(folder, norm_kind=None if shards.norm is None else shards.norm.kind), shards)


def load_circuit_tracer(folder: Path, shards: ShardSet) -> Transcoder:
    """Read the shard set's layer of a circuit-tracer set; the layers without a transcoder are zeros there."""
    norm_kind = None if shards.norm is None else shards.norm.kind
    transcoder = circuit_tracer.read(folder, layer=shards.manifest.source.layer, norm_kind=norm_kind)
    if not bool(transcoder.W_dec.any()):
        raise UserError(
            f"layer {shards.manifest.source.layer} of the circuit-tracer set {folder} is empty: its decoder is all "
            "zeros, nobody trained a transcoder for it. Compare on a shard set of a layer that has one"
        )
    return _named(transcoder, shards)


def _named(transcoder: Transcoder, shards: ShardSet) -> Transcoder:
    """`transcoder` under the shard set's name of its model: others write gemma-2-2b for google/gemma-2-2b."""
    own, theirs = str(shards.manifest.model.get("model", "")), transcoder.config.model
    if not theirs or _last(theirs) == _last(own):
        transcoder.config = transcoder.config.model_copy(update={"model": own})
    return transcoder


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
