"""Which shard set a run is measured on: the one that is named, else the one that it was trained on.

run.json names that set, and a digest of what it held. A set of another content in the same folder is refused: its val
documents may be among those that the run was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matryoshka.checkpoints import Checkpoint, run_record
from matryoshka.errors import UserError
from matryoshka.locations import location
from matryoshka.runs import RUN_FILE
from matryoshka.shards import ShardSet
from matryoshka.shards.records import has_manifest


def open_shards(checkpoint: Checkpoint, named: Path | str | None, note: Callable[[str], None]) -> ShardSet:
    """The shard set at `named`, else that of the run; `note` reports that one.

    Raises UserError when there is none, or the run's is no longer what it was.
    """
    if named is not None:
        return ShardSet.open(named)
    record = run_record(checkpoint.folder)
    trained_on = _text(record, "config", "shards")
    if trained_on is None:
        raise UserError(
            f"no shard set was named, and {checkpoint.run} has no {RUN_FILE} that names one; pass --shards, for "
            "example --shards data/l17"
        )
    found = _found(location(trained_on), checkpoint.folder)
    if found is None:
        raise UserError(
            f"{checkpoint.run} was trained on {trained_on}, and no shard set is there any more; name where it is now "
            "with --shards"
        )
    shards = ShardSet.open(found)
    if _text(record, "identity", "shard_set", "digest") not in (None, shards.digest):
        raise UserError(
            f"the shard set {found} is not as it was when {checkpoint.run} was trained on it (it was grown, or "
            "harvested again), so that the run may have seen its val rows; if it is meant all the same, pass "
            f"--shards {found}"
        )
    note(f"{checkpoint.name}: on {found}, the shard set that it was trained on")
    return shards


def names_shards(folder: Path) -> bool:
    """Whether the weights in `folder`, or the run that it is, say what they were trained on."""
    return _text(run_record(folder), "config", "shards") is not None


def tokenizer_name(shards: ShardSet) -> str:
    """The tokenizer that made the set's tokens: a folder, or a repository of the hub."""
    tokenizer = shards.manifest.model.get("tokenizer")
    name = tokenizer.get("name") if isinstance(tokenizer, dict) else None
    return str(name or shards.manifest.model.get("model", ""))


def _text(record: Any, *keys: str) -> str | None:
    """What a record holds under these keys, one in the other, where that is text."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, str) else None


def _found(trained_on: Path | str, folder: Path) -> Path | str | None:
    """A relative folder is looked for from here on, then from the folders above the run: the run may be used from
    another directory than the one it was trained in."""
    if isinstance(trained_on, str):
        return trained_on
    starts = [Path(), *folder.resolve().parents]
    return next((start / trained_on for start in starts if has_manifest(start / trained_on)), None)
