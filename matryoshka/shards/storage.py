"""Where the files of a shard set are, and what the format needs of that: whole writes, sizes, ranges, one writer.

A file has a key, its path below the set: train/source/c/0/0/0/0. The storage is a folder (storage_local.py) or a prefix
of an object store (storage_object.py); storage_open.py tells which, and nothing else in this package knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matryoshka.locations import location_name
from matryoshka.runs import json_bytes
from matryoshka.shards.manifest import FileRecord

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Storage(ABC):
    """Where one shard set is."""

    def __init__(self, where: Path | str) -> None:
        self.location = where
        """A Path, or the URL as str."""

    def __str__(self) -> str:
        return str(self.location)

    @property
    def name(self) -> str:
        """l17, of data/l17 and of s3://bucket/l17."""
        return location_name(self.location)

    @abstractmethod
    def check(self) -> None:
        """Raise UserError when files could not be written here. Changes nothing, so ask it early."""

    @abstractmethod
    def make(self) -> None:
        """Make the storage, where it has to be made."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the storage for this process alone; raises UserError when another one has it."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room that is left; None where nobody knows."""

    @abstractmethod
    def list_root(self) -> list[str]:
        """Names of the files and folders at the top."""

    @abstractmethod
    def keys(self, folder: str) -> list[str]:
        """Keys of the files directly in a folder, sorted."""

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether `key`, which a stranger may have written, stays inside the storage."""

    @abstractmethod
    def sizes(self, keys: Iterable[str]) -> Mapping[str, int]:
        """Sizes in bytes of those of the files that exist."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """A whole small file, or None when there is none."""

    @abstractmethod
    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """`read` of each."""

    @abstractmethod
    def ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Bytes (offset, length) of a file, uint8."""

    def read_into(self, key: str, offset: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [n], with the bytes of a file from `offset` on."""
        (out[:],) = self.ranges(key, [(offset, len(out))])

    @abstractmethod
    def tail(self, key: str, length: int) -> bytes:
        """The last bytes of a file."""

    @abstractmethod
    def checksum(self, key: str) -> FileRecord:
        """Size and crc32c of what a reader would get of a file now. Raises OSError when there is none."""

    def written(self, key: str) -> FileRecord:
        """Size and crc32c of a file that this process has just written."""
        return self.checksum(key)

    @abstractmethod
    def publish(self, key: str, content: bytes) -> None:
        """Write a small file, whole or not at all; on the disk when this returns."""

    def publish_json(self, key: str, content: object) -> None:
        """`publish` of JSON, as `matryoshka.runs.publish_json` writes it."""
        self.publish(key, json_bytes(content))

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file, if there is one."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove everything below a folder."""

    @abstractmethod
    def remove_partials(self) -> None:
        """Remove what killed writes have left half-made."""

    @abstractmethod
    def fsync(self, keys: Iterable[str]) -> None:
        """Return when these files, and the names that lead to them, will survive a power cut."""

    @abstractmethod
    def fsync_metadata(self) -> None:
        """The same of all metadata, statistics and the root."""

    @abstractmethod
    def store(self, *, writable: bool) -> Store:
        """The storage for Zarr."""


_LEFT_BY_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


def is_left_by_system(name: str) -> bool:
    """Whether a file manager or a copy between systems made it: macOS's `._name` beside each file, views of folders."""
    return name.startswith("._") or name in _LEFT_BY_SYSTEMS
