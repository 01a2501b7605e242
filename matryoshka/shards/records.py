"""What a shard set says of itself on the disk, finished or not: the manifest and the commit records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from matryoshka.config import explain
from matryoshka.errors import UserError
from matryoshka.locations import inside
from matryoshka.runs import parse_json
from matryoshka.shards.manifest import FORMAT, MANIFEST_FOLDER, CommitRecord, Manifest, record_name
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage

ROOT_FILE = "zarr.json"
"""Zarr's metadata of a group; the attributes of the root's are the manifest."""


def has_manifest(path: str | Path | Storage) -> bool:
    """Whether there is the root metadata of some Zarr group or array at `path`."""
    return ROOT_FILE in open_storage(path).sizes([ROOT_FILE])


def read_manifest(path: str | Path | Storage) -> Manifest:
    """The manifest of the shard set at `path`, finished or not; raises UserError when there is none."""
    storage = open_storage(path)
    content = read_root(storage)
    attributes = content.get("attributes") if isinstance(content, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise UserError(
            f"{storage} is not a shard set, though it has a {ROOT_FILE}: its attribute format is not {FORMAT!r}"
        )
    try:
        return Manifest.model_validate(attributes)
    except ValidationError as error:
        raise UserError(f"the manifest of {storage} cannot be read by this version: {explain(error)}") from error


def read_root(storage: Storage) -> Any:
    """The JSON of the root's metadata. Raises UserError when there is none, or it is no JSON."""
    try:
        text = storage.read(ROOT_FILE)
        if text is None:
            inside_it = _sets_inside(storage)
            if inside_it:
                raise UserError(f"{storage} is not a shard set, but holds {', '.join(inside_it)}; name one of them")
            raise UserError(
                f"{storage} is not a shard set (no {ROOT_FILE}); make one with: harvest run --out {storage} ..."
            )
        # Not through zarr, which has an exception of its own for each way in which a stranger's file can be odd.
        return json.loads(text.decode("utf-8"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{inside(storage.location, ROOT_FILE)} cannot be read: {error}") from error


def _sets_inside(storage: Storage) -> list[str]:
    """Where there are Zarr groups one level down."""
    keys = {f"{name}/{ROOT_FILE}": name for name in sorted(storage.list_root())}
    return [str(inside(storage.location, keys[key])) for key in storage.sizes(list(keys))]


def read_records(path: str | Path | Storage) -> list[CommitRecord]:
    """The commit records of a shard set, sorted by name."""
    storage = open_storage(path)
    keys = [key for key in storage.keys(MANIFEST_FOLDER) if key.endswith(".json")]
    return [parse_record(storage, key, text) for key, text in zip(keys, storage.read_all(keys), strict=True)]


def parse_record(storage: Storage, key: str, text: bytes | None) -> CommitRecord:
    """One commit record, from its file. Raises UserError when it cannot be read or is that of another shard than its
    name says."""
    where = str(inside(storage.location, key))
    content = parse_json(text or b"", where, what="shard set")
    try:
        record = CommitRecord.model_validate(content)
    except ValidationError as error:
        raise UserError(f"the commit record {where} cannot be read: {explain(error)}") from error
    if key != f"{MANIFEST_FOLDER}/{record_name(record.split, record.shard)}":
        raise UserError(f"the commit record {where} is that of shard {record.shard} of {record.split}")
    return record


def held(storage: Storage, keys: Iterable[str]) -> list[str]:
    """`keys` from records, which are not to be trusted. Raises UserError for one that points outside the set."""
    keys = list(keys)
    for key in keys:
        if not storage.contains(key):
            raise UserError(f"{storage}: a commit record points outside the shard set ({key}); it is not to be trusted")
    return keys
