"""A shard set survives a failure at any moment, and never mixes two harvests."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet, ShardSetWriter, layout, storage_local
from matryoshka.shards.storage_local import LocalStorage


class Killed(Exception):
    """Stands for the end of the process."""


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def bomb(real: Any, after: int, *, late: bool) -> Any:
    """The real function, which after `after` calls ends the process, before or after doing its work."""
    n_calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > after and not late:
            raise Killed
        result = real(*args, **kwargs)
        if n_calls > after:
            raise Killed
        return result

    return call


STAGES = [
    ("create_arrays", layout, 0),
    ("fsync_metadata", LocalStorage, 0),
    ("_array", ShardSetWriter, 0),
    ("_array", ShardSetWriter, 12),
    ("fsync_path", storage_local, 30),
    ("written", LocalStorage, 5),
    ("fsync", LocalStorage, 0),
    ("publish_json", LocalStorage, 1),
    ("publish_json", LocalStorage, 9),
    ("fsync_metadata", LocalStorage, 1),
    ("publish", layout, 0),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("name", "module", "after"), STAGES)
def test_continued_equals_uninterrupted(
    name: str, module: Any, after: int, late: bool, toy: Any, toy_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, bomb(getattr(module, name), after, late=late))
        with pytest.raises(Killed):
            toy.write(path)
    if name != "publish":
        with pytest.raises(UserError, match="unfinished|not a shard set"):
            ShardSet.open(path)
    toy.write(path)
    assert files(path) == files(toy_path)
    ShardSet.open(path, verify=True)


def test_half_written_files_of_a_killed_process_are_swept(toy: Any, toy_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "set"
    writer = ShardSetWriter.open(path, toy.manifest, toy.norm)
    toy.write_shards(writer, 2)
    # As zarr's LocalStore and publish_bytes name what they have not renamed yet.
    (path / "train/source/c/0/0/0/0.123abc.partial").write_bytes(b"half")
    (path / "manifest/train-00004.json.partial").write_bytes(b'{"half')
    toy.write(path)
    assert files(path) == files(toy_path)


def test_a_set_that_is_being_repaired_does_not_pass_for_whole(toy: Any, toy_path: Path, tmp_path: Path) -> None:
    path = toy.write(tmp_path / "set")
    (path / "manifest" / "train-00003.json").unlink()
    writer = ShardSetWriter.open(path, toy.manifest, toy.norm)
    toy.write_shards(writer)
    with pytest.raises(UserError, match="unfinished: it has 10 of 10"):
        ShardSet.open(path)  # the statistics may be those of the old shard
    writer.finish()
    assert files(path) == files(toy_path)


def test_committed_shards_are_not_written_again(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "set"
    first = ShardSetWriter.open(path, toy.manifest, toy.norm)
    toy.write_shards(first, 5)
    written = {p: p.stat().st_mtime_ns for p in path.rglob("c/*") if p.is_file()}
    second = ShardSetWriter.open(path, toy.manifest, toy.norm)
    committed = [second.is_committed(split, shard) for split, shard in toy.pieces]
    assert committed == [True] * 5 + [False] * 5
    assert second.bytes_written() == first.bytes_written() > 0
    toy.write_shards(second)
    assert all(p.stat().st_mtime_ns == before for p, before in written.items())


def test_text_that_ends_early_gives_a_smaller_set(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "set"
    writer = ShardSetWriter.open(path, toy.manifest, toy.norm)
    pieces = {key: piece for key, piece in toy.pieces.items() if key[0] == "val" or key[1] < 5}
    last = pieces["train", 4]
    pieces["train", 4] = (last[0][:1], last[1][:1], last[2][:, :1], last[3][:, :1])
    for (split, shard), piece in pieces.items():
        writer.write_shard(split, shard, *piece)
    writer.finish()
    shards = ShardSet.open(path, verify=True)
    assert shards.train.shard_contexts == (2, 2, 2, 2, 1)
    assert shards.train.n_contexts == 9
    source = torch.cat([shards.train.activations("source", shard)[shards.train.keep(shard)] for shard in range(5)])
    torch.testing.assert_close(shards.stats("source").mean, source.double().mean(0), rtol=1e-12, atol=0)
    assert not list(path.glob("train/source/c/5*"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_split_is_refused(split: str, toy: Any, tmp_path: Path) -> None:
    writer = ShardSetWriter.open(tmp_path / "set", toy.manifest, toy.norm)
    for (name, shard), piece in toy.pieces.items():
        if name != split:
            writer.write_shard(name, shard, *piece)
    with pytest.raises(UserError, match=f"no text fell into the {split} split"):
        writer.finish()
    with pytest.raises(UserError, match="unfinished"):
        ShardSet.open(tmp_path / "set")


def test_other_settings_are_refused_with_the_difference(toy: Any, make_toy: Any, toy_path: Path) -> None:
    before = files(toy_path)
    other = make_toy(seed=7).manifest
    with pytest.raises(
        UserError, match=r"with other settings \(settings\.seed: 0 -> 7\)\. Pass --out .*nothing was ch"
    ):
        ShardSetWriter.open(toy_path, other, toy.norm)
    moved = toy.manifest.model_copy(update={"target": toy.manifest.target.model_copy(update={"layer": 2})})
    with pytest.raises(UserError, match=r"target\.layer: 1 -> 2"):
        ShardSetWriter.open(toy_path, moved, toy.norm)
    assert files(toy_path) == before


def test_newer_libraries_may_continue(toy: Any, make_toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "set"
    toy.write_shards(ShardSetWriter.open(path, toy.manifest, toy.norm), 3)
    later = make_toy()
    later.manifest = later.manifest.model_copy(update={"versions": {"numpy": "3"}})
    later.write(path)
    assert ShardSet.open(path).manifest.versions == {"numpy": "2"}


@pytest.mark.parametrize("name", ["train", "stats", "notes.txt", "manifest/old.json"])
def test_a_folder_of_somebody_else_is_left_alone(name: str, toy: Any, tmp_path: Path) -> None:
    """A folder called train/ may be anyone's data: it must never be taken for the rest of a killed start."""
    path = tmp_path / "photos"
    (path / name).parent.mkdir(parents=True)
    if "." in name:
        (path / name).write_text("mine")
    else:
        (path / name).mkdir()
        (path / name / "cat.png").write_text("mine")
    before = sorted(path.rglob("*"))
    with pytest.raises(UserError, match="is not empty and not a shard set"):
        ShardSetWriter.open(path, toy.manifest, toy.norm)
    assert sorted(path.rglob("*")) == before


def test_a_zarr_group_of_somebody_else_is_left_alone(toy: Any, tmp_path: Path) -> None:
    import zarr

    path = tmp_path / "group"
    zarr.create_group(str(path), zarr_format=3).create_array("train", shape=(3,), dtype="int32")[:] = 1
    before = files(path)
    with pytest.raises(UserError, match="is not a shard set"):
        ShardSetWriter.open(path, toy.manifest, toy.norm)
    assert files(path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [2, 3])
def test_nonfinite_activations_are_not_committed(value: float, side: int, toy: Any, tmp_path: Path) -> None:
    writer = ShardSetWriter.open(tmp_path / "set", toy.manifest, toy.norm)
    piece = [tensor.clone() for tensor in toy.pieces["train", 0]]
    piece[side][4, 1, 7] = value
    piece[side][4, 0, 7] = value
    with pytest.raises(UserError, match=r"2 values of (source|target) are not finite in shard 0 of train.*--dtype"):
        writer.write_shard("train", 0, *piece)
    assert not writer.is_committed("train", 0)
    assert not list((tmp_path / "set" / "manifest").glob("*.json"))
    toy.write_shards(writer, 1)
    assert writer.is_committed("train", 0)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("float16", "Harvest with --dtype bf16 or"), ("bfloat16", "Harvest with --dtype fp32"), ("float32", "No --dtype")],
)
def test_what_overflows_is_sent_to_a_wider_dtype(dtype: str, advice: str, toy: Any, tmp_path: Path) -> None:
    manifest = toy.manifest.model_copy(update={"model": {**toy.manifest.model, "weight_dtype": dtype}})
    writer = ShardSetWriter.open(tmp_path / "set", manifest, toy.norm)
    piece = [tensor.clone() for tensor in toy.pieces["train", 0]]
    piece[2][4, 1, 7] = float("inf")
    with pytest.raises(UserError, match=rf"overflowed in {dtype}\. {advice}"):
        writer.write_shard("train", 0, *piece)


def test_full_disk_is_one_sentence_and_no_commit(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer_ = ShardSetWriter.open(tmp_path / "set", toy.manifest, toy.norm)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("zarr.storage._local._put", full)
        with pytest.raises(UserError, match=r"No space left on device\); free some space .* same command again"):
            toy.write_shards(writer_, 1)
    assert not list((tmp_path / "set" / "manifest").glob("*.json"))
    toy.write(tmp_path / "set")
    ShardSet.open(tmp_path / "set", verify=True)


def test_changed_text_is_noticed(toy: Any, tmp_path: Path) -> None:
    writer = ShardSetWriter.open(tmp_path / "set", toy.manifest, toy.norm)
    toy.write_shards(writer, 3)
    tokens, doc_ids, *_ = toy.pieces["train", 1]
    writer.check_same_text("train", 1, tokens, doc_ids)
    for changed in ((tokens + 1, doc_ids), (tokens, doc_ids + 1), (tokens[:1], doc_ids[:1])):
        with pytest.raises(UserError, match="the text of toy text is not what it was when shard 1 of train"):
            writer.check_same_text("train", 1, *changed)
