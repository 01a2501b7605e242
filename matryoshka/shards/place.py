"""Where the files of a shard set are, and what the format needs of that: whole writes, sizes, ranges, one writer.

A file has a key, its path below the set: train/source/c/0/0/0/0. A place is a folder (here) or a prefix of an object
store (object_place.py); nothing else in this package knows which.
"""

from __future__ import annotations

import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matryoshka.errors import UserError
from matryoshka.locations import location, location_name
from matryoshka.runs import check_directory, exclusive, fsync_path, json_bytes, make_directory, publish_bytes
from matryoshka.shards.checksum import checksum
from matryoshka.shards.manifest import MANIFEST_FOLDER, FileRecord

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Place(ABC):
    """Where one shard set lies."""

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
        """Make the place, where it has to be made."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the place for this process alone; raises UserError when another one has it."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room that is left; None where nobody knows."""

    @abstractmethod
    def tops(self) -> list[str]:
        """Names of the files and folders at the top."""

    @abstractmethod
    def keys(self, folder: str) -> list[str]:
        """Keys of the files directly in a folder, sorted."""

    @abstractmethod
    def holds(self, key: str) -> bool:
        """Whether `key`, which a stranger may have written, stays inside the place."""

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
    def sweep(self) -> None:
        """Remove what killed writes have left half-made."""

    @abstractmethod
    def settle(self, keys: Iterable[str]) -> None:
        """Return when these files, and the names that lead to them, will survive a power cut."""

    @abstractmethod
    def settle_small(self) -> None:
        """The same of all metadata, statistics and the root."""

    @abstractmethod
    def store(self, *, writable: bool) -> Store:
        """The place for Zarr."""


_LEFT_BY_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


def is_left_by_system(name: str) -> bool:
    """Whether a file manager or a copy between systems made it: macOS's `._name` beside each file, views of folders."""
    return name.startswith("._") or name in _LEFT_BY_SYSTEMS


class Folder(Place):
    """A shard set on a disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self._safe = {""}
        """Folders whose own names are known to be on the disk."""

    def check(self) -> None:
        check_directory(self.path)

    def make(self) -> None:
        make_directory(self.path / MANIFEST_FOLDER)
        fsync_path(self.path.parent)

    def exclusive(self) -> AbstractContextManager[None]:
        return exclusive(self.path / MANIFEST_FOLDER)

    def free_bytes(self) -> int | None:
        place = self.path.resolve()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def tops(self) -> list[str]:
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return [name for name in names if not is_left_by_system(name)]

    def keys(self, folder: str) -> list[str]:
        files = [file for file in sorted((self.path / folder).glob("*")) if file.is_file()]
        return [f"{folder}/{file.name}" for file in files if not is_left_by_system(file.name)]

    def holds(self, key: str) -> bool:
        return (self.path / key).resolve().is_relative_to(self.path.resolve())

    def sizes(self, keys: Iterable[str]) -> Mapping[str, int]:
        files = {key: self.path / key for key in keys}
        return {key: file.stat().st_size for key, file in files.items() if file.is_file()}

    def read(self, key: str) -> bytes | None:
        file = self.path / key
        return file.read_bytes() if file.is_file() else None

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.read(key) for key in keys]

    def read_into(self, key: str, offset: int, out: np.ndarray) -> None:
        # Into memory that is there already: the page faults of a map cost as much as the copy.
        with (self.path / key).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(out):
                n_read = file.readinto(out.data[done:])
                if not n_read:
                    raise UserError(f"{self.path / key} is damaged: it ends before byte {offset + len(out)}")
                done += n_read

    def ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Mapped, not read: the codec takes its bytes from the page cache, and nothing is held once an array is
        dropped. Private and writable, since torch warns of tensors that must not be written."""
        return [self._mapped(key, offset, length) for offset, length in ranges]

    def _mapped(self, key: str, offset: int, length: int) -> np.ndarray:
        begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with (self.path / key).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), offset - begin + length, access=mmap.ACCESS_COPY, offset=begin)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(mapped, np.uint8, count=length, offset=offset - begin)

    def tail(self, key: str, length: int) -> bytes:
        with (self.path / key).open("rb") as file:
            file.seek(-length, os.SEEK_END)
            return file.read()

    def checksum(self, key: str) -> FileRecord:
        return checksum(self.path / key)

    def publish(self, key: str, content: bytes) -> None:
        publish_bytes(self.path / key, content)

    def delete(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        shutil.rmtree(self.path / folder, ignore_errors=True)
        self._safe = {""}

    def sweep(self) -> None:
        for partial in self.path.rglob("*.partial"):
            partial.unlink()

    def settle(self, keys: Iterable[str]) -> None:
        # Text, not Path, which here took more time than the statistics of a shard.
        folders = set()
        for key in keys:
            fsync_path(f"{self.path}/{key}")
            folder = key.rpartition("/")[0]
            folders.add(folder)
            # A new file is only safe once the names above it are.
            while folder not in self._safe:
                self._safe.add(folder)
                folder = folder.rpartition("/")[0]
                folders.add(folder)
        for folder in folders:
            fsync_path(f"{self.path}/{folder}")

    def settle_small(self) -> None:
        for path in self.path.rglob("zarr.json"):
            fsync_path(path)
        for folder in ("stats", "norm"):
            for path in (self.path / folder).rglob("*"):
                if path.is_file():
                    fsync_path(path)
        for path in (self.path, *(p for p in self.path.iterdir() if p.is_dir())):
            fsync_path(path)

    def store(self, *, writable: bool) -> Store:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=not writable)


def place_of(where: str | Path | Place) -> Place:
    """The place that a user named: a folder, or the URL of an object store. Raises UserError for an unusable URL."""
    if isinstance(where, Place):
        return where
    found = location(where)
    if isinstance(found, Path):
        return Folder(found)
    from matryoshka.shards.object_place import ObjectPlace

    return ObjectPlace(found)
