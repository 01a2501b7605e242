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
from matryoshka.shards.place import Place, place_of

ROOT_FILE = "zarr.json"
"""Zarr's metadata of a group; the attributes of the root's are the manifest."""


def has_manifest(path: str | Path | Place) -> bool:
    """Whether there is the root metadata of some Zarr group or array at `path`."""
    return ROOT_FILE in place_of(path).sizes([ROOT_FILE])


def read_manifest(path: str | Path | Place) -> Manifest:
    """The manifest of the shard set at `path`, finished or not; raises UserError when there is none."""
    place = place_of(path)
    content = read_root(place)
    attributes = content.get("attributes") if isinstance(content, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise UserError(
            f"{place} is not a shard set, though it has a {ROOT_FILE}: its attribute format is not {FORMAT!r}"
        )
    try:
        return Manifest.model_validate(attributes)
    except ValidationError as error:
        raise UserError(f"the manifest of {place} cannot be read by this version: {explain(error)}") from error


def read_root(place: Place) -> Any:
    """The JSON of the root's metadata. Raises UserError when there is none, or it is no JSON."""
    try:
        text = place.read(ROOT_FILE)
        if text is None:
            inside_it = _sets_inside(place)
            if inside_it:
                raise UserError(f"{place} is not a shard set, but holds {', '.join(inside_it)}; name one of them")
            raise UserError(
                f"{place} is not a shard set (no {ROOT_FILE}); make one with: harvest run --out {place} ..."
            )
        # Not through zarr, which has an exception of its own for each way in which a stranger's file can be odd.
        return json.loads(text.decode("utf-8"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{inside(place.location, ROOT_FILE)} cannot be read: {error}") from error


def _sets_inside(place: Place) -> list[str]:
    """Where there are Zarr groups one level down."""
    keys = {f"{name}/{ROOT_FILE}": name for name in sorted(place.tops())}
    return [str(inside(place.location, keys[key])) for key in place.sizes(list(keys))]


def read_records(path: str | Path | Place) -> list[CommitRecord]:
    """The commit records of a shard set, sorted by name."""
    place = place_of(path)
    keys = [key for key in place.keys(MANIFEST_FOLDER) if key.endswith(".json")]
    return [parse_record(place, key, text) for key, text in zip(keys, place.read_all(keys), strict=True)]


def parse_record(place: Place, key: str, text: bytes | None) -> CommitRecord:
    """One commit record, from its file. Raises UserError when it cannot be read or is that of another shard than its
    name says."""
    where = str(inside(place.location, key))
    content = parse_json(text or b"", where, what="shard set")
    try:
        record = CommitRecord.model_validate(content)
    except ValidationError as error:
        raise UserError(f"the commit record {where} cannot be read: {explain(error)}") from error
    if key != f"{MANIFEST_FOLDER}/{record_name(record.split, record.shard)}":
        raise UserError(f"the commit record {where} is that of shard {record.shard} of {record.split}")
    return record


def held(place: Place, keys: Iterable[str]) -> list[str]:
    """`keys` from records, which are not to be trusted. Raises UserError for one that points outside the set."""
    keys = list(keys)
    for key in keys:
        if not place.holds(key):
            raise UserError(f"{place}: a commit record points outside the shard set ({key}); it is not to be trusted")
    return keys
