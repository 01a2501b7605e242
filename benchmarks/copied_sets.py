"""Copies of a shard set with another codec or another number of shards, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matryoshka.shards import Manifest, ShardSet, ShardSetWriter


def copy_set(shards: ShardSet, folder: Path, *, codec: str | None = None, times: float = 1) -> ShardSet:
    """The set in `folder` with `codec`, its train shards `times` as many: the first ones, or all again and again."""
    settings: dict[str, Any] = shards.manifest.model_dump() | {"complete": False}
    if codec is not None:
        settings["codec"] = codec
    sizes = shards.train.shard_contexts
    chosen = [number % len(sizes) for number in range(max(1, round(times * len(sizes))))]
    settings["splits"]["train"]["shard_contexts"] = [sizes[number] for number in chosen]
    writer = ShardSetWriter.open(folder, Manifest.model_validate(settings), shards.norm)
    for split, numbers in ((shards.train, chosen), (shards.val, range(shards.val.n_shards))):
        for place, number in enumerate(numbers):
            sides = [split.activations(side, number) for side in ("source", "target")]
            writer.write_shard(split.name, place, split.tokens(number), split.doc_ids(number), sides[0], sides[1])
    writer.finish()
    return ShardSet.open(folder)
