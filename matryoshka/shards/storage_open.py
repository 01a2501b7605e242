"""Which storage a user means."""

from __future__ import annotations

from pathlib import Path

from matryoshka.locations import location
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_local import LocalStorage
from matryoshka.shards.storage_object import ObjectStorage


def open_storage(where: str | Path | Storage) -> Storage:
    """What a user named: a folder, or the URL of an object store. Raises UserError for an unusable URL."""
    if isinstance(where, Storage):
        return where
    found = location(where)
    if isinstance(found, Path):
        return LocalStorage(found)
    return ObjectStorage(found)
