"""Reading every byte of a shard set, finished or not, and naming each shard that is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matryoshka.errors import UserError
from matryoshka.shards import layout
from matryoshka.shards.manifest import MANIFEST_FOLDER, CommitRecord, Manifest, record_name
from matryoshka.shards.reader import ShardSet, problem_with
from matryoshka.shards.records import ROOT_FILE, held, parse_record, read_manifest, read_root
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage


@dataclass(frozen=True, slots=True)
class Damage:
    """One shard that is not whole."""

    split: str
    shard: int
    problem: str
    """Of which file, and what is wrong with it."""

    def __str__(self) -> str:
        return f"shard {self.shard} of {self.split} {self.problem}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found."""

    n_planned: int
    n_committed: int
    n_bytes: int
    """Read and compared."""
    complete: bool
    """Whether the set was finished; its missing shards are then damage, else they are work to be done."""
    damage: tuple[Damage, ...]
    metadata: tuple[str, ...]
    """Arrays whose zarr.json differs from the copy in the root's."""

    @property
    def is_whole(self) -> bool:
        """Whether everything that should be there is, and is right."""
        return not self.damage and not self.metadata


def verify(path: str | Path | Storage, checked: Callable[[str, int, int], None] = lambda *_: None) -> Verdict:
    """Check every planned shard of the set at `path`: its commit record, the presence, sizes and crc32c of its files,
    and what they hold: shapes, finite values, document numbers in order, special tokens where they belong, and the
    facts that the record states of them.

    `checked(split, shard, n_bytes)` is called after each shard. Raises UserError when `path` is no shard set.
    """
    storage = open_storage(path)
    manifest = read_manifest(storage)
    root = layout.open_root(storage, writable=False, finished=manifest.complete)
    damage: list[Damage] = []
    records: list[CommitRecord] = []
    n_bytes = 0
    shards = ShardSet(storage, manifest, records, root)
    for split, plan in manifest.splits.items():
        for shard in range(plan.n_shards):
            key = f"{MANIFEST_FOLDER}/{record_name(split, shard)}"
            text = storage.read(key)
            if text is None:
                if manifest.complete:
                    damage.append(Damage(split, shard, f"has lost its commit record {key}"))
                continue
            record, problem = _checked_record(shards, key, text)
            if problem is not None:
                damage.append(Damage(split, shard, problem))
            if record is not None:
                records.append(record)
                n_bytes += sum(entry.size for entry in record.files.values())
            checked(split, shard, n_bytes)
    if manifest.complete:
        sizes = storage.sizes(held(storage, manifest.summary))
        problem = problem_with(storage, manifest.summary, layout.summary_keys(manifest), sizes, verify=True)
        if problem is not None:
            # The statistics of the set are made again when any shard is.
            damage.append(Damage("train", 0, f"is whole, but the statistics of the set are not: the set {problem}"))
    return Verdict(
        n_planned=sum(plan.n_shards for plan in manifest.splits.values()),
        n_committed=len(records),
        n_bytes=n_bytes,
        complete=manifest.complete,
        damage=tuple(damage),
        metadata=tuple(name for name, _ in _changed_metadata(storage, manifest)),
    )


def discard(path: str | Path | Storage, verdict: Verdict) -> None:
    """Take back what `verify` found to be damaged, so that the same harvest command makes it again.

    The metadata of arrays is written again at once, from the copy in the root's.
    """
    storage = open_storage(path)
    for name, wanted in _changed_metadata(storage, read_manifest(storage)):
        storage.publish(f"{name}/{ROOT_FILE}", json.dumps(wanted, indent=2).encode())
    for damage in verdict.damage:
        storage.delete(f"{MANIFEST_FOLDER}/{record_name(damage.split, damage.shard)}")


def _checked_record(shards: ShardSet, key: str, text: bytes) -> tuple[CommitRecord | None, str | None]:
    """The record in the file `key`, and what is wrong with it or with what it stands for."""
    storage, manifest = shards.storage, shards.manifest
    try:
        record = parse_record(storage, key, text)
        keys = layout.shard_keys(manifest, record.split, record.shard)
        sizes = storage.sizes(held(storage, record.files))
        problem = problem_with(storage, record.files, keys, sizes, verify=True)
    except UserError as error:
        return None, f"has a bad commit record: {error}"
    if problem is None:
        problem = _wrong_content(shards, record)
    return record, problem


def _wrong_content(shards: ShardSet, record: CommitRecord) -> str | None:
    """Files as committed may still hold what they should not: a broken model, another tokenizer, an edited record."""
    manifest, split, shard = shards.manifest, shards.split(record.split), record.shard
    if record.n_contexts != split.shard_contexts[shard]:
        return f"holds {record.n_contexts} contexts, and the manifest says {split.shard_contexts[shard]}"
    try:
        tokens, doc_ids, keep = split.tokens(shard), split.doc_ids(shard), split.keep(shard)
        sides = {side: split.activations(side, shard) for side in layout.SIDES}
    except (UserError, ValueError, RuntimeError, KeyError, OSError) as error:
        return f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    widths = {"source": manifest.source.width, "target": manifest.target.width}
    for side, values in sides.items():
        wanted = (manifest.ctx_len, record.n_contexts, widths[side])
        if tuple(values.shape) != wanted:
            return f"has {side} of shape {list(values.shape)}, not {list(wanted)}"
        n_bad = int((~torch.isfinite(values)).sum())
        if n_bad:
            return f"has {n_bad} values of {side} that are not finite"
    if manifest.bos_id is not None and not bool((tokens[:, 0] == manifest.bos_id).all()):
        return f"has a context that does not start with the BOS token {manifest.bos_id}"
    n_tokens = manifest.model.get("tokenizer", {}).get("vocab_size")
    if int(tokens.min()) < 0 or (isinstance(n_tokens, int) and int(tokens.max()) >= n_tokens):
        return f"has token ids from {int(tokens.min())} to {int(tokens.max())}; the tokenizer has 0 to {n_tokens}"
    if bool((doc_ids.flatten().diff() < 0).any()):
        return "has documents that are not in order"
    found: dict[str, Any] = {
        "n_rows": int(keep.sum()),
        "largest": {side: float(values.abs().max()) for side, values in sides.items()},
    }
    if record.n_documents is not None:
        found["n_documents"] = len(doc_ids.unique())
    for name, value in found.items():
        if getattr(record, name) != value:
            return f"has {name} = {value}, and its commit record says {getattr(record, name)}"
    return None


def _changed_metadata(storage: Storage, manifest: Manifest) -> list[tuple[str, Any]]:
    """Arrays whose own zarr.json is not what the root's has of them, with what it should be."""
    if not manifest.complete:
        return []  # the copy is made when the set is finished
    copies = (read_root(storage).get("consolidated_metadata") or {}).get("metadata", {})
    try:
        texts = storage.read_all([f"{name}/{ROOT_FILE}" for name in copies])
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"the metadata of {storage} cannot be read ({error}); check its permissions and its disk"
        ) from error
    changed = []
    for (name, wanted), text in zip(copies.items(), texts, strict=True):
        wanted = {key: value for key, value in wanted.items() if key != "consolidated_metadata"}
        try:
            found = json.loads((text or b"").decode("utf-8"))
        except ValueError:
            found = None
        if found != wanted and name.partition("/")[0] != MANIFEST_FOLDER:
            changed.append((name, wanted))
    return changed
