"""A shard set in an object store: s3://bucket/l17, gs://, az:// and whatever else obstore opens.

Credentials, endpoint and region come from the usual environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...).
A PUT is whole or not at all and lasts when it has returned, so nothing has to be renamed or synced here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from matryoshka.errors import UserError
from matryoshka.shards.checksum import checksum_of
from matryoshka.shards.lease import lease
from matryoshka.shards.manifest import FileRecord
from matryoshka.shards.storage import Storage, is_left_by_system

if TYPE_CHECKING:
    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

_PIECE = 8 * 2**20
_LARGE = 2**20
"""Bytes from which a checksum is made in a thread of its own."""
_PARALLEL = 16
"""Small files that are read at once: each costs a round trip."""


class ObjectError(UserError, OSError):
    """An object store did not do what it was asked. Also an OSError, because it stands where a disk would fail."""

    def __init__(self, url: str, error: Exception) -> None:
        reason = " ".join(str(error).partition("\n\nDebug source")[0].split())
        reason = re.sub(r"<\?xml.*?>", "", reason)
        super().__init__(
            f"{url}: {reason[:400]}. Check the URL, the network, and the credentials and endpoint in the environment "
            "(for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true "
            "for an endpoint without TLS)"
        )
        self.strerror = reason[:400]


class ObjectStorage(Storage):
    """A shard set under the prefix of a bucket."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url
        self.client = _client(url)
        self.guard: Callable[[], None] = _nothing
        """Called before each commit: raises UserError when the storage is no longer this process's."""
        self._written: dict[str, FileRecord] = {}

    def check(self) -> None:
        # That a bucket can be written only a PUT tells; that it can be reached and read, a listing does.
        self.list_root()

    def make(self) -> None:
        """Prefixes need no making."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with lease(self.client, self.url, self.explained) as check:
            self.guard = check
            try:
                yield
            finally:
                self.guard = _nothing

    def free_bytes(self) -> int | None:
        return None

    def list_root(self) -> list[str]:
        import obstore

        with self.explained():
            found: Any = obstore.list_with_delimiter(self.client)
        names = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return [name for name in names if not is_left_by_system(name)]

    def keys(self, folder: str) -> list[str]:
        names = {key: key.removeprefix(f"{folder}/") for key in self._listed(folder)}
        return sorted(key for key, name in names.items() if "/" not in name and not is_left_by_system(name))

    def contains(self, key: str) -> bool:
        return not key.startswith("/") and ".." not in key.split("/")

    def sizes(self, keys: Iterable[str]) -> Mapping[str, int]:
        keys = list(keys)
        if len(keys) > _PARALLEL:
            # One listing names a thousand objects; asking for each is a round trip.
            listed = self._listed("")
            return {key: listed[key] for key in keys if key in listed}
        found = dict(zip(keys, self._parallel(self._size, keys), strict=True))
        return {key: size for key, size in found.items() if size is not None}

    def read(self, key: str) -> bytes | None:
        import obstore

        with self.explained(), suppress(FileNotFoundError):
            return bytes(obstore.get(self.client, key).bytes())
        return None

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        return self._parallel(self.read, keys)

    def ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        import obstore

        starts, lengths = zip(*ranges, strict=True)
        with self.explained():
            found = obstore.get_ranges(self.client, key, starts=starts, lengths=lengths)
        # Copied, since torch warns of tensors that must not be written.
        return [np.frombuffer(memoryview(part), np.uint8).copy() for part in found]

    def read_into(self, key: str, offset: int, out: np.ndarray) -> None:
        import obstore

        with self.explained():
            found = memoryview(obstore.get_range(self.client, key, start=offset, length=len(out)))
        if len(found) != len(out):
            raise UserError(f"{self.url}/{key} is damaged: it ends before byte {offset + len(out)}")
        out[:] = np.frombuffer(found, np.uint8)

    def tail(self, key: str, length: int) -> bytes:
        import obstore

        with self.explained():
            # Not as a suffix, which not every store knows.
            size: Any = obstore.head(self.client, key)["size"]
            return bytes(obstore.get_range(self.client, key, start=size - length, length=length))

    def checksum(self, key: str) -> FileRecord:
        import obstore

        with self.explained():
            return checksum_of(memoryview(part) for part in obstore.get(self.client, key).stream())

    def written(self, key: str) -> FileRecord:
        # Of the bytes as they were sent: to fetch a shard again would cost as much as writing it.
        return self._written.pop(key, None) or self.checksum(key)

    def publish(self, key: str, content: bytes) -> None:
        import obstore

        self.guard()
        with self.explained():
            obstore.put(self.client, key, content)

    def delete(self, key: str) -> None:
        import obstore

        with self.explained(), suppress(FileNotFoundError):
            obstore.delete(self.client, key)

    def delete_folder(self, folder: str) -> None:
        import obstore

        if found := list(self._listed(folder)):
            with self.explained():
                obstore.delete(self.client, found)

    def remove_partials(self) -> None:
        """Nothing is ever half-made here. (Parts of an upload that was cut off are for the bucket's lifecycle rule.)"""

    def fsync(self, keys: Iterable[str]) -> None:
        """A PUT lasts when it has returned."""

    def fsync_metadata(self) -> None:
        """A PUT lasts when it has returned."""

    def store(self, *, writable: bool) -> Store:
        return _zarr_store(self, writable=writable)

    def sent(self, key: str, content: memoryview) -> None:
        """Zarr is about to write this."""
        self._written[key] = checksum_of(content[start : start + _PIECE] for start in range(0, len(content), _PIECE))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what obstore raises into `ObjectError`, but for a file that is not there."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise  # answers, not failures
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ObjectError(self.url, error) from error
            raise
        except BaseError as error:
            raise ObjectError(self.url, error) from error

    def _size(self, key: str) -> int | None:
        import obstore

        with self.explained(), suppress(FileNotFoundError):
            return obstore.head(self.client, key)["size"]
        return None

    def _listed(self, folder: str) -> dict[str, int]:
        import obstore

        with self.explained():
            pages: Any = obstore.list(self.client, prefix=f"{folder}/" if folder else None)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

    def _parallel(self, function: Callable[[str], Any], keys: Sequence[str]) -> list[Any]:
        if len(keys) < 2:
            return [function(key) for key in keys]
        with ThreadPoolExecutor(_PARALLEL) as executor:
            return list(executor.map(function, keys))


def _zarr_store(storage: ObjectStorage, *, writable: bool) -> Store:
    """Zarr's own store class over `storage`, with two things added: checksums of what is sent, and plain errors."""
    from zarr.storage import ObjectStore

    class CheckedStore(ObjectStore[Any]):
        """Tells `storage` of each file that is written."""

        async def get(self, *args: Any, **options: Any) -> Buffer | None:
            with storage.explained():
                return await super().get(*args, **options)

        async def set(self, key: str, value: Buffer) -> None:
            content = memoryview(value.as_buffer_like())
            if len(content) < _LARGE:
                storage.sent(key, content)
            else:
                await asyncio.to_thread(storage.sent, key, content)
            with storage.explained():
                await super().set(key, value)

    return CheckedStore(storage.client, read_only=not writable)


def _client(url: str) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(
            f"{url} is in an object store, and the package obstore, which reads those, is not installed. Run: "
            "pip install -e '.[cloud]' in the checkout, or pip install obstore; or name a folder"
        ) from error
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        reason = " ".join(str(error).partition("\n\nDebug source")[0].split())
        raise UserError(
            f"{url} is neither a folder nor the URL of an object store ({reason}); such a URL looks like "
            "s3://bucket/l17, gs://bucket/l17 or az://container/l17"
        ) from error


def _nothing() -> None:
    pass
