"""Chunks read from the shard files themselves, against Zarr."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ShardingCodec

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.shards.direct import ShardFiles, open_files

SHAPE = (3, 8, 5, 7)
COMPACT = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2, blocksize=512 * 1024)


def make_array(folder: Path, *, dtype: str = "uint16", codec: Any = COMPACT, written: int = 3, **options: Any) -> Any:
    """An array as a shard set has it, chunked by 2 positions, with `written` of its 3 shards."""
    settings: dict[str, Any] = {"shape": SHAPE, "shards": (1, *SHAPE[1:]), "chunks": (1, 2, 5, 7), "dtype": dtype}
    settings["config"] = {"write_empty_chunks": True}
    array: Any = zarr.create_array(str(folder), compressors=None if codec is None else [codec], **(settings | options))
    values = np.random.default_rng(0).integers(-100, 100, SHAPE).astype(dtype)
    for shard in range(written):
        array[shard] = values[shard]
    return array


def files_of(folder: Path, array: Any) -> ShardFiles:
    files = open_files(folder, array)
    assert files is not None
    return files


@pytest.mark.parametrize(("dtype", "codec"), [("uint16", COMPACT), ("uint16", None), ("int8", COMPACT)])
def test_equal_to_zarr(tmp_path: Path, dtype: str, codec: Any) -> None:
    array = make_array(tmp_path / "a", dtype=dtype, codec=codec)
    files = files_of(tmp_path / "a", array)
    for shard in range(3):
        for start in range(0, 8, 2):
            for stop in range(start + 2, 9, 2):
                found = files.read(shard, start, stop)
                assert found is not None
                assert found.dtype == np.dtype(dtype)
                assert np.array_equal(found, array[shard, start:stop])


@pytest.mark.parametrize("codec", [COMPACT, None])
def test_what_is_read_may_be_written_without_touching_the_file(tmp_path: Path, codec: Any) -> None:
    array = make_array(tmp_path / "a", codec=codec)
    found = files_of(tmp_path / "a", array).read(1, 2, 4)
    assert found is not None
    expected = found.copy()
    torch.from_numpy(found.view(np.int16)).zero_()  # a tensor that must not be written would warn
    assert np.array_equal(array[1, 2:4], expected)


def test_only_whole_chunks_of_what_was_written(tmp_path: Path) -> None:
    files = files_of(tmp_path / "a", make_array(tmp_path / "a"))
    assert [files.read(0, *span) for span in ((1, 4), (0, 3), (2, 2), (6, 10))] == [None] * 4
    empty = make_array(tmp_path / "b", written=0, config={"write_empty_chunks": False})
    empty[0, 0:2] = 1  # the other chunks of this shard are absent
    holes = files_of(tmp_path / "b", empty)
    assert holes.read(0, 0, 2) is not None
    assert holes.read(0, 2, 4) is None


@pytest.mark.parametrize(
    "options",
    [
        {"codec": GzipCodec()},
        {"shards": None},
        {"serializer": BytesCodec(endian="big")},
        {"chunks": (1, 2, 5, 1)},
        {"shards": (1, 4, 5, 7)},
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    ],
    ids=str,
)
def test_arrays_of_other_kinds_are_left_to_zarr(tmp_path: Path, options: dict[str, Any]) -> None:
    array = make_array(tmp_path / "a", **options)
    assert open_files(tmp_path / "a", array) is None


def test_an_index_at_the_start_is_left_to_zarr(tmp_path: Path) -> None:
    inner = ShardingCodec(chunk_shape=(1, 2, 5, 7), index_location="start")
    array: Any = zarr.create_array(
        str(tmp_path / "a"), shape=SHAPE, chunks=(1, *SHAPE[1:]), dtype="uint16", serializer=inner, compressors=None
    )
    assert open_files(tmp_path / "a", array) is None


def test_damage_is_an_error(tmp_path: Path) -> None:
    array = make_array(tmp_path / "a")
    (path,) = (tmp_path / "a/c/0").rglob("0/0/0")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="index differs from its checksum"):
        files_of(tmp_path / "a", array).read(0, 0, 2)
    (path,) = (tmp_path / "a/c/1").rglob("0/0/0")
    content = bytearray(path.read_bytes())
    content[:16] = bytes(16)  # the header of the first chunk's blosc frame
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="cannot be decoded"):
        files_of(tmp_path / "a", array).read(1, 0, 2)


@pytest.mark.parametrize("codec", ["compact", "raw", "int8"])
def test_a_shard_set_reads_the_same_either_way(make_toy: Any, tmp_path: Path, codec: str) -> None:
    shards = ShardSet.open(make_toy(codec).write(tmp_path / "set"))
    through_zarr = ShardSet.open(tmp_path / "set")
    for split in (through_zarr.train, through_zarr.val):
        split._files = {"source": None, "target": None}
    for split, other in ((shards.train, through_zarr.train), (shards.val, through_zarr.val)):
        for shard in range(split.n_shards):
            for side in ("source", "target"):
                assert torch.equal(split.activations(side, shard), other.activations(side, shard))
                assert split._files[side] is not None


@pytest.mark.parametrize(("dtype", "codec"), [("uint16", COMPACT), ("uint16", None), ("int8", COMPACT)])
def test_memory_that_is_used_again_holds_the_chunk_that_was_asked_for_last(
    tmp_path: Path, dtype: str, codec: Any
) -> None:
    array = make_array(tmp_path / "a", dtype=dtype, codec=codec)
    files = files_of(tmp_path / "a", array)
    places = set()
    for shard in (2, 0, 1):
        for start in (6, 0, 4, 2):
            found = files.read(shard, start, start + 2, reuse=True)
            assert found is not None
            assert np.array_equal(found, array[shard, start : start + 2])
            places.add(found.ctypes.data)
    assert len(places) == 1
    with ThreadPoolExecutor(1) as executor:
        elsewhere = executor.submit(files.read, 0, 0, 2, reuse=True).result()
    assert elsewhere is not None
    assert np.array_equal(found, array[1, 2:4])  # another thread has memory of its own
    whole = files.read(0, 0, 8, reuse=True)  # several chunks are new memory
    assert whole is not None
    assert np.array_equal(whole, array[0])


@pytest.mark.parametrize("codec", [COMPACT, None])
def test_a_file_that_ends_early_is_damaged(tmp_path: Path, codec: Any) -> None:
    files = files_of(tmp_path / "a", make_array(tmp_path / "a", codec=codec))
    assert files.read(1, 6, 8, reuse=True) is not None  # the index is known now
    (path,) = (tmp_path / "a/c/1").rglob("0/0/0")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged: it ends before byte"):
        files.read(1, 6, 8, reuse=True)
