"""Chunks read from the shard files themselves, at the speed of the codec.

Zarr's own pipeline reaches about a third of the rate at which one core decodes these chunks (benchmarks/stream.py). A
Zarr v3 shard is chunks one after another, and at its end an index: offset and length of each as little-endian uint64,
then the crc32c of the index (the specification's sharding_indexed codec). Only what this package writes is read this
way; of everything else `open_files` says None, and the reader goes through Zarr.
"""

from __future__ import annotations

import mmap
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.errors import UserError

_ABSENT = 2**64 - 1
"""Offset of a chunk that was never written."""
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]


class ShardFiles:
    """The files of one array [n_shards, positions, contexts, width] with one file a shard, chunked by positions."""

    def __init__(self, folder: Path, *, shape: tuple[int, ...], step: int, dtype: np.dtype[Any], codec: str) -> None:
        """`folder`: the array's. `shape`: of one shard. `step`: positions in a chunk. `codec`: blosc, or raw."""
        self._folder = folder
        self._shape = shape
        self._step = step
        self._dtype = dtype
        self._blosc = codec == "blosc"
        self._index = lru_cache(maxsize=None)(self._read_index)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray | None:
        """Positions [start, stop) of a shard, [positions, contexts, width]; None unless they are whole chunks that
        lie in the file. Of a single raw chunk this is a private map of the file, which costs no copy."""
        if start % self._step or stop % self._step or not 0 <= start < stop <= self._shape[0]:
            return None
        places = self._index(shard)[start // self._step : stop // self._step]
        if bool((places[:, 0] == _ABSENT).any()):
            return None
        path = self._path(shard)
        if len(places) == 1 and not self._blosc:
            return self._chunk(path, places[0])
        out = np.empty((stop - start, *self._shape[1:]), self._dtype)
        for number, place in enumerate(places):
            self._chunk(path, place, out[number * self._step :][: self._step])
        return out

    def _chunk(self, path: Path, place: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        offset, length = (int(value) for value in place)
        begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with path.open("rb") as file:
            # Mapped, not read: the codec takes its bytes from the page cache, and nothing is held once the map is
            # dropped. Private and writable, since torch warns of tensors that must not be written.
            mapped = mmap.mmap(file.fileno(), offset - begin + length, access=mmap.ACCESS_COPY, offset=begin)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        stored = np.frombuffer(mapped, np.uint8, count=length, offset=offset - begin)
        shape = (self._step, *self._shape[1:])
        if not self._blosc:
            if length != self._dtype.itemsize * np.prod(shape, dtype=np.int64):
                raise _damaged(path, f"a chunk has {length} bytes")
            values = stored.view(self._dtype).reshape(shape)
            if out is None:
                return values
            out[:] = values
            return out
        from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] -- a compiled module

        if out is None:
            out = np.empty(shape, self._dtype)
        try:
            blosc.decompress(stored, out)
        except (RuntimeError, ValueError) as error:
            raise _damaged(path, f"a chunk cannot be decoded ({error})") from error
        return out

    def _read_index(self, shard: int) -> np.ndarray:
        """[chunks, 2] uint64: offset and length of each."""
        import google_crc32c

        path = self._path(shard)
        size = 16 * (self._shape[0] // self._step)
        with path.open("rb") as file:
            file.seek(-(size + 4), 2)
            found = file.read()
        if google_crc32c.value(found[:size]) != int.from_bytes(found[size:], "little"):
            raise _damaged(path, "its index differs from its checksum")
        return np.frombuffer(found[:size], "<u8").reshape(-1, 2)

    def _path(self, shard: int) -> Path:
        return self._folder / "c" / str(shard) / "/".join("0" * len(self._shape))


def open_files(folder: Path, array: Any) -> ShardFiles | None:
    """The files of a Zarr array below `folder`, or None when it is not of the kind that is read directly.

    Raises nothing for a strange array: Zarr itself may well know how to read it.
    """
    metadata = array.metadata.to_dict()
    codecs = metadata.get("codecs", ())
    if not folder.is_dir() or metadata.get("storage_transformers") or len(codecs) != 1:
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
    return ShardFiles(folder, shape=grid[1:], step=chunk[1], dtype=dtype.newbyteorder("<"), codec=codec)


def _plain(codecs: Any) -> list[dict[str, Any]]:
    """Codecs as JSON has them: enumerations as their values, and no empty configuration."""
    plain = []
    for codec in codecs or ():
        configuration = {key: getattr(value, "value", value) for key, value in codec.get("configuration", {}).items()}
        plain.append({"name": codec["name"]} | ({"configuration": configuration} if configuration else {}))
    return plain


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is damaged: {problem}. Delete its record in manifest/ and run the same harvest again")
