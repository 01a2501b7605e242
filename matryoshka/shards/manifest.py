"""What a shard set says of itself: the manifest (root attributes), commit records, and the plan of its shards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from matryoshka.config import Config, digest
from matryoshka.errors import UserError
from matryoshka.held_out import FIRST_VAL_UNIT, ValUnit

FORMAT = "matryoshka-shard-set"
SPLITS = ("train", "val")
MANIFEST_FOLDER = "manifest"

SHARD_BYTES = 304_000_000
"""A shard is at most this large a side, uncompressed: 64 contexts of 1024 at width 2304 are 302 MB."""
CHUNK_BYTES = 4 * 2**20
"""A chunk is at most this large, uncompressed; 2 to 4 MB is where reads stop being bound by overhead."""
MIN_SHARDS = 8
"""Shards a train split is cut into even when it is small, so that work can be resumed and spread."""
MAX_SHARDS = 1_000_000
"""In a split: 300 TB a side. More is a mistake, and planning them would fill memory before the disk is looked at."""
BYTES_PER_VALUE = 2


class SiteFacts(Config):
    """One side of the pairs."""

    site: str
    layer: int
    hook_point: str
    width: int


class SplitPlan(Config):
    """How the contexts of one split are in shards."""

    contexts: int
    """Contexts a shard has room for: the size of its Zarr array."""
    chunk_positions: int
    """Positions in a chunk; a chunk holds them of every context of its shard."""
    shard_contexts: tuple[int, ...]
    """Contexts each shard really holds."""

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self.shard_contexts)

    @property
    def n_contexts(self) -> int:
        """Number of contexts in all shards."""
        return sum(self.shard_contexts)


class NormFacts(Config):
    """The norm behind the source site; its gain and bias are arrays in norm/."""

    kind: Literal["rms", "layer"]
    eps: float
    has_bias: bool


class FileRecord(Config):
    """Size in bytes and crc32c of one file."""

    size: int
    crc32c: int


_LATER_KNOWN = {"versions", "summary", "measured", "skipped_lines", "complete"}
FILE_FACTS = ("n_files", "n_bytes", "files_digest")
"""What `Manifest.dataset` says of local files. Files may change after the text that was harvested; whether that text is
still the same is decided by the ids of the committed shards."""


class Manifest(Config):
    """The root attributes of a shard set: every fact a reader needs, nothing it must be told twice."""

    format: Literal["matryoshka-shard-set"] = FORMAT
    format_version: Literal[1] = 1
    model: dict[str, Any]
    """Id, revision, weight dtype, tokenizer."""
    dataset: dict[str, Any]
    """Name or path, revision, column."""
    source: SiteFacts
    target: SiteFacts
    ctx_len: int
    bos_id: int | None
    special_ids: tuple[int, ...]
    """Token ids whose positions never enter training or metrics."""
    norm: NormFacts | None
    codec: str
    splits: dict[str, SplitPlan]
    settings: dict[str, Any]
    """The harvest settings that decide the content; a resume with others is refused."""
    versions: dict[str, Any]
    summary: dict[str, FileRecord] = Field(default_factory=dict)
    """The files of stats/ and norm/ that belong to no shard; known when the set is complete."""
    measured: dict[str, float] = Field(default_factory=dict)
    """What the codec did, known when the set is complete: compression_ratio (bytes over those of bfloat16), and of
    int8 source_error and target_error, its relative error over the rows under 10 times the median norm."""
    skipped_lines: dict[str, int] = Field(default_factory=dict)
    """File -> how many broken lines of it were left out on request, known when the set is complete."""
    complete: bool = False

    @property
    def val_unit(self) -> ValUnit:
        """What was held out: whole documents, or blocks of documents that train has parts of too."""
        return "document" if self.settings.get("val_unit", FIRST_VAL_UNIT) == "document" else "block"

    def digest(self) -> str:
        """Identity of what was asked for, whatever libraries wrote it and however far it got."""
        content = self.model_dump(mode="json", exclude=_LATER_KNOWN)
        return digest(content)


class CodecError(Config):
    """What a lossy codec lost of one side of a shard: float64 sums over the rows under 10 times the median norm."""

    error_sq: float
    """sum ||x - x^||^2"""
    total_sq: float
    """sum ||x||^2"""


class CommitRecord(Config):
    """Says that one shard is whole. Written after its files are on the disk."""

    format_version: Literal[1] = 1
    split: str
    shard: int
    n_contexts: int
    n_rows: int
    """Positions that are not special."""
    nonfinite: Literal[0] = 0
    largest: dict[str, float] = Field(default_factory=dict)
    """Largest absolute value of each side."""
    n_documents: int | None = None
    """Documents that have tokens here; a document may go on in the next shard. Not in the first sets' records."""
    loss: dict[str, CodecError] = Field(default_factory=dict)
    """Of each side, where the codec is lossy."""
    files: dict[str, FileRecord]

    @property
    def name(self) -> str:
        """File name of this record."""
        return record_name(self.split, self.shard)


def record_name(split: str, shard: int) -> str:
    """File name of the commit record of a shard: train-00007.json."""
    return f"{split}-{shard:05d}.json"


def plan_splits(n_contexts: int, val_fraction: float, ctx_len: int, width: int) -> dict[str, SplitPlan]:
    """Cut `n_contexts` contexts into a train and a val split and each into shards.

    `width` is the larger of d_in and d_out. A shard is at most SHARD_BYTES a side and train has at least MIN_SHARDS
    (fewer only when it has fewer contexts).
    """
    n_val = min(max(1, round(n_contexts * val_fraction)), n_contexts - 1)
    return {
        "train": _plan_split(n_contexts - n_val, ctx_len, width, MIN_SHARDS),
        "val": _plan_split(n_val, ctx_len, width, 1),
    }


def extend_splits(
    splits: Mapping[str, SplitPlan], n_contexts: int, val_fraction: float, ctx_len: int, width: int
) -> dict[str, SplitPlan]:
    """The plan of a set that grows to `n_contexts`: its shards stay as they are, new ones of the same room follow.

    Text comes in one order however much of it is wanted, so what a shard holds does not change. A last shard with
    fewer contexts keeps them.
    """
    goal = plan_splits(n_contexts, val_fraction, ctx_len, width)
    grown = {}
    for name, plan in splits.items():
        n_missing = max(0, goal[name].n_contexts - plan.n_contexts)
        added = [min(plan.contexts, n_missing - start) for start in range(0, n_missing, plan.contexts)]
        grown[name] = plan.model_copy(update={"shard_contexts": (*plan.shard_contexts, *added)})
    return grown


def is_extension(old: Mapping[str, SplitPlan], new: Mapping[str, SplitPlan]) -> bool:
    """Whether `new` has all the shards of `old` in their places, and perhaps more."""
    return old.keys() == new.keys() and all(
        (plan.contexts, plan.chunk_positions) == (new[name].contexts, new[name].chunk_positions)
        and plan.shard_contexts == new[name].shard_contexts[: plan.n_shards]
        for name, plan in old.items()
    )


def _plan_split(n_contexts: int, ctx_len: int, width: int, min_shards: int) -> SplitPlan:
    context_bytes = ctx_len * width * BYTES_PER_VALUE
    room = max(1, SHARD_BYTES // context_bytes)
    even = math.ceil(n_contexts / math.ceil(n_contexts / room))
    # Rounded down, because rounding up would make 5 shards of 9 contexts, not the 8 that were asked for.
    contexts = min(even, max(1, n_contexts // min_shards))
    if n_contexts > MAX_SHARDS * contexts:
        raise UserError(
            f"{n_contexts * ctx_len:,} tokens would make more than {MAX_SHARDS:,} shards of {contexts} contexts, about "
            f"{n_contexts * context_bytes / 1e12:,.0f} TB a side; ask for fewer tokens"
        )
    sizes = [min(contexts, n_contexts - start) for start in range(0, n_contexts, contexts)]
    return SplitPlan(
        contexts=contexts,
        chunk_positions=_chunk_positions(ctx_len, contexts * width * BYTES_PER_VALUE),
        shard_contexts=tuple(sizes),
    )


def _chunk_positions(ctx_len: int, position_bytes: int) -> int:
    """The largest divisor of ctx_len whose positions fit into CHUNK_BYTES (Zarr wants whole chunks in a shard)."""
    most = max(1, CHUNK_BYTES // position_bytes)
    return max(p for p in range(1, ctx_len + 1) if ctx_len % p == 0 and p <= most)
