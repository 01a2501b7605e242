"""Chunks read from the shard files themselves, at the speed of the codec.

Zarr's own pipeline reaches about a third of the rate at which one core decodes these chunks (benchmarks/stream.py). A
Zarr v3 shard is chunks one after another, and at its end an index: offset and length of each as little-endian uint64,
then the crc32c of the index (the specification's sharding_indexed codec). From an object store the index and the wanted
chunks alone are fetched. Only what this package writes is read this way; of everything else `open_files` says None, and
the reader goes through Zarr.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.errors import UserError
from matryoshka.locations import inside
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage

_ABSENT = 2**64 - 1
"""Offset of a chunk that was never written."""
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]


class ShardFiles:
    """The files of one array [n_shards, positions, contexts, width] with one file a shard, chunked by positions."""

    def __init__(
        self, storage: Storage, name: str, *, shape: tuple[int, ...], step: int, dtype: np.dtype[Any], codec: str
    ) -> None:
        """`name`: the array's. `shape`: of one shard. `step`: positions in a chunk. `codec`: blosc, or raw."""
        self._storage = storage
        self._name = name
        self._shape = shape
        self._step = step
        self._dtype = dtype
        self._blosc = codec == "blosc"
        self._index = lru_cache(maxsize=None)(self._read_index)
        self._held = threading.local()
        self._chunk_bytes = dtype.itemsize * step * math.prod(shape[1:])

    def read(self, shard: int, start: int, stop: int, *, reuse: bool = False) -> np.ndarray | None:
        """Positions [start, stop) of a shard, [positions, contexts, width]; None unless they are whole chunks that
        are in the file. Of a single raw chunk this is a private map of the file, which costs no copy.

        With `reuse` one chunk is read into memory that the thread's next such call overwrites: fresh memory for each
        costs as much in page faults as a raw chunk's copy.
        """
        if start % self._step or stop % self._step or not 0 <= start < stop <= self._shape[0]:
            return None
        places = self._index(shard)[start // self._step : stop // self._step]
        if bool((places[:, 0] == _ABSENT).any()):
            return None
        key = self._key(shard)
        if reuse and len(places) == 1:
            return self._read_again(key, int(places[0, 0]), int(places[0, 1]))
        # Of a folder these are maps, which cost nothing before they are decoded.
        stored = self._storage.ranges(key, [(int(offset), int(length)) for offset, length in places])
        if len(stored) == 1 and not self._blosc:
            return self._raw(key, stored[0])
        out = np.empty((stop - start, *self._shape[1:]), self._dtype)
        for number, chunk in enumerate(stored):
            part = out[number * self._step :][: self._step]
            if self._blosc:
                self._decode(key, chunk, part)
            else:
                part[:] = self._raw(key, chunk)
        return out

    def _read_again(self, key: str, offset: int, length: int) -> np.ndarray:
        """One chunk, in this thread's own memory."""
        decoded = self._scratch("decoded", self._chunk_bytes)
        values = decoded.view(self._dtype).reshape(self._step, *self._shape[1:])
        if self._blosc:
            if length > 2 * self._chunk_bytes + 64:
                raise _damaged(self._storage, key, f"a chunk of {self._chunk_bytes} bytes takes {length}")
            stored = self._scratch("stored", length)
            self._storage.read_into(key, offset, stored)
            self._decode(key, stored, values)
        else:
            self._check_raw(key, length)
            self._storage.read_into(key, offset, decoded)
        return values

    def _scratch(self, name: str, n_bytes: int) -> np.ndarray:
        held = getattr(self._held, name, None)
        if held is None or len(held) < n_bytes:
            held = np.empty(n_bytes, np.uint8)
            setattr(self._held, name, held)
        return held[:n_bytes]

    def _raw(self, key: str, stored: np.ndarray) -> np.ndarray:
        self._check_raw(key, len(stored))
        return stored.view(self._dtype).reshape(self._step, *self._shape[1:])

    def _check_raw(self, key: str, length: int) -> None:
        if length != self._chunk_bytes:
            raise _damaged(self._storage, key, f"a chunk has {length} bytes")

    def _decode(self, key: str, stored: np.ndarray, out: np.ndarray) -> None:
        from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] -- a compiled module

        try:
            blosc.decompress(stored, out)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self._storage, key, f"a chunk cannot be decoded ({error})") from error

    def _read_index(self, shard: int) -> np.ndarray:
        """[chunks, 2] uint64: offset and length of each."""
        import google_crc32c

        key = self._key(shard)
        size = 16 * (self._shape[0] // self._step)
        found = self._storage.tail(key, size + 4)
        if google_crc32c.value(found[:size]) != int.from_bytes(found[size:], "little"):
            raise _damaged(self._storage, key, "its index differs from its checksum")
        return np.frombuffer(found[:size], "<u8").reshape(-1, 2)

    def _key(self, shard: int) -> str:
        return f"{self._name}/c/{shard}/{'/'.join('0' * len(self._shape))}".removeprefix("/")


def open_files(path: str | Path | Storage, array: Any, name: str = "") -> ShardFiles | None:
    """The files of the Zarr array `name` below `path`, or None when it is not of the kind that is read directly.

    Raises nothing for a strange array: Zarr itself may well know how to read it.
    """
    metadata = array.metadata.to_dict()
    codecs = metadata.get("codecs", ())
    if metadata.get("storage_transformers") or len(codecs) != 1:
        return None
    sharding = codecs[0]
    inner = sharding.get("configuration", {})
    grid = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    chunk = tuple(inner.get("chunk_shape", ()))
    keys = metadata["chunk_key_encoding"]
    is_ours = (
        sharding["name"] == "sharding_indexed"
        and inner.get("index_location") in ("end", None)
        and _plain(inner.get("index_codecs")) == _INDEX_CODECS
        and (keys["name"], keys.get("configuration", {}).get("separator", "/")) == ("default", "/")
        and len(array.shape) == 4
        and grid == (1, *array.shape[1:])
        and (chunk[0], *chunk[2:]) == (1, *grid[2:])
        and grid[1] % chunk[1] == 0
    )
    if not is_ours:
        return None
    # int8 has no byte order, and Zarr then writes none.
    first, *rest = _plain(inner["codecs"])
    dtype = np.dtype(array.dtype)
    if first != _BYTES and not (first["name"] == "bytes" and dtype.itemsize == 1):
        return None
    names = [codec["name"] for codec in rest]
    if names not in ([], ["blosc"]):
        return None
    codec = "blosc" if names else "raw"
    dtype = dtype.newbyteorder("<")
    return ShardFiles(open_storage(path), name, shape=grid[1:], step=chunk[1], dtype=dtype, codec=codec)


def _plain(codecs: Any) -> list[dict[str, Any]]:
    """Codecs as JSON has them: enumerations as their values, and no empty configuration."""
    plain = []
    for codec in codecs or ():
        configuration = {key: getattr(value, "value", value) for key, value in codec.get("configuration", {}).items()}
        plain.append({"name": codec["name"]} | ({"configuration": configuration} if configuration else {}))
    return plain


def _damaged(storage: Storage, key: str, problem: str) -> UserError:
    where = inside(storage.location, key)
    return UserError(f"{where} is damaged: {problem}. Delete its record in manifest/ and run the same harvest again")
