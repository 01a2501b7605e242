"""A shard set in a folder of this machine: written aside and renamed, and fsynced, since a rename alone may be lost."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matryoshka.errors import UserError
from matryoshka.runs import check_directory, exclusive, fsync_path, make_directory, publish_bytes
from matryoshka.shards.checksum import checksum
from matryoshka.shards.manifest import MANIFEST_FOLDER, FileRecord
from matryoshka.shards.storage import Storage, is_left_by_system

if TYPE_CHECKING:
    from zarr.abc.store import Store


class LocalStorage(Storage):
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
        existing = self.path.resolve()
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    def list_root(self) -> list[str]:
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return [name for name in names if not is_left_by_system(name)]

    def keys(self, folder: str) -> list[str]:
        files = [file for file in sorted((self.path / folder).glob("*")) if file.is_file()]
        return [f"{folder}/{file.name}" for file in files if not is_left_by_system(file.name)]

    def contains(self, key: str) -> bool:
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

    def remove_partials(self) -> None:
        for partial in self.path.rglob("*.partial"):
            partial.unlink()

    def fsync(self, keys: Iterable[str]) -> None:
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

    def fsync_metadata(self) -> None:
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
