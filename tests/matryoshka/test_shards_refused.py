"""What a reader refuses: unfinished, damaged, foreign and newer sets. Zarr itself would read most of them as zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet, ShardSetWriter


@pytest.fixture
def copy(toy_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_path, tmp_path / "copy"))


def edit_root(path: Path, **attributes: Any) -> None:
    content = json.loads((path / "zarr.json").read_text())
    content["attributes"].update(attributes)
    (path / "zarr.json").write_text(json.dumps(content))


def edit_record(path: Path, name: str, change: Any) -> None:
    file = path / "manifest" / f"{name}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_unfinished_set_is_refused_with_the_count(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "set"
    writer = ShardSetWriter.open(path, toy.manifest, toy.norm)
    with pytest.raises(UserError, match=r"unfinished: it has 0 of 10 shards"):
        ShardSet.open(path)
    toy.write_shards(writer, 4)
    with pytest.raises(UserError, match=r"unfinished: it has 4 of 10 shards. Run the harvest command"):
        ShardSet.open(path)
    toy.write_shards(writer)
    with pytest.raises(UserError, match=r"unfinished: it has 10 of 10 shards"):
        ShardSet.open(path)  # the statistics are missing
    writer.finish()
    assert ShardSet.open(path).train.n_shards == 9


def test_missing_commit_record_is_refused(copy: Path) -> None:
    (copy / "manifest" / "train-00003.json").unlink()
    with pytest.raises(UserError, match="9 of 10 shards"):
        ShardSet.open(copy)


def test_record_of_another_shard_does_not_count(copy: Path) -> None:
    """Ten records, but one is of a shard that the manifest does not plan."""
    record = copy / "manifest" / "train-00003.json"
    edit_record(copy, "train-00003", lambda content: content.update(shard=9))
    with pytest.raises(UserError, match="is that of shard 9 of train"):
        ShardSet.open(copy)
    record.rename(record.with_name("train-00009.json"))
    with pytest.raises(UserError, match="unfinished"):
        ShardSet.open(copy)


FILES = [
    "train/source/c/3/0/0/0",
    "train/target/c/8/0/0/0",
    "train/tokens/c/0/0/0",
    "val/doc_ids/c/0/0/0",
    "stats/source/shard_sum/c/2/0",
    "stats/target/row_norm/c/1/0/0",
    "stats/normalized/variance/c/0",
    "norm/gain/c/0",
]


@pytest.mark.parametrize("key", FILES)
def test_deleted_file_is_refused(key: str, copy: Path) -> None:
    (copy / key).unlink()
    with pytest.raises(UserError, match=rf"damaged: .* misses {key}\. Delete that record and run the same"):
        ShardSet.open(copy)


@pytest.mark.parametrize("key", FILES)
def test_truncated_file_is_refused(key: str, copy: Path) -> None:
    content = (copy / key).read_bytes()
    (copy / key).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"has {len(content) - 1} bytes in {key}, not {len(content)}"):
        ShardSet.open(copy)


@pytest.mark.parametrize("key", FILES)
def test_flipped_bit_is_found_on_request(key: str, copy: Path) -> None:
    content = bytearray((copy / key).read_bytes())
    content[len(content) // 2] ^= 4
    (copy / key).write_bytes(bytes(content))
    ShardSet.open(copy)
    with pytest.raises(UserError, match=f"differs from its checksum in {key}"):
        ShardSet.open(copy, verify=True)


@pytest.mark.parametrize("key", [*FILES[:2], FILES[-1]])
def test_damage_is_repaired_as_the_message_says(key: str, copy: Path, toy: Any, toy_path: Path) -> None:
    (copy / key).unlink()
    with pytest.raises(UserError) as refused:
        ShardSet.open(copy)
    (record,) = {word for word in str(refused.value).split() if word.startswith("manifest/")}
    (copy / record).unlink()
    toy.write(copy)
    assert ShardSet.open(copy, verify=True).digest == ShardSet.open(toy_path).digest


@pytest.mark.parametrize("key", ["../outside", "/etc/hostname", "train/../../outside"])
def test_record_that_points_outside_is_refused(key: str, copy: Path) -> None:
    (copy.parent / "outside").write_bytes(b"secret")

    def change(content: dict[str, Any]) -> None:
        content["files"][key] = {"size": 6, "crc32c": 0}

    edit_record(copy, "train-00000", change)
    with pytest.raises(UserError, match="points outside the shard set"):
        ShardSet.open(copy)


def test_record_that_vouches_for_too_little_is_refused(copy: Path) -> None:
    edit_record(copy, "val-00000", lambda content: content["files"].pop("val/source/c/0/0/0/0"))
    (copy / "val/source/c/0/0/0/0").unlink()
    with pytest.raises(UserError, match="does not vouch for exactly the files"):
        ShardSet.open(copy)


def test_record_and_manifest_must_agree_on_contexts(copy: Path) -> None:
    edit_record(copy, "train-00008", lambda content: content.update(n_contexts=2))
    with pytest.raises(UserError, match="does not hold the contexts that the manifest says"):
        ShardSet.open(copy)


def test_record_with_nonfinite_values_is_refused(copy: Path) -> None:
    edit_record(copy, "train-00000", lambda content: content.update(nonfinite=3))
    with pytest.raises(UserError, match="nonfinite"):
        ShardSet.open(copy)


def test_newer_formats_are_refused(copy: Path) -> None:
    edit_record(copy, "train-00000", lambda content: content.update(format_version=2))
    with pytest.raises(UserError, match="format_version 2; this version reads 1"):
        ShardSet.open(copy)
    edit_record(copy, "train-00000", lambda content: content.update(format_version=1))
    edit_root(copy, format_version=2)
    with pytest.raises(UserError, match=r"cannot be read by this version: format_version"):
        ShardSet.open(copy)


def test_unknown_manifest_keys_are_refused(copy: Path) -> None:
    edit_root(copy, moon_phase="full")
    with pytest.raises(UserError, match="moon_phase: unknown key"):
        ShardSet.open(copy)


def test_foreign_places_are_refused(tmp_path: Path) -> None:
    import zarr

    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("x")
    for place in ("plain", "file", "nowhere"):
        with pytest.raises(UserError, match=r"is not a shard set \(no zarr.json\)"):
            ShardSet.open(tmp_path / place)
    zarr.create_group(str(tmp_path / "group"), zarr_format=3, attributes={"format": "other"})
    zarr.create_array(str(tmp_path / "array"), shape=(2,), dtype="int32", zarr_format=3)
    for content in ("[1]", '{"attributes": 3}'):
        (tmp_path / "plain" / "zarr.json").write_text(content)
        for place in ("group", "array", "plain"):
            with pytest.raises(UserError, match="is not a shard set, though it has a zarr.json"):
                ShardSet.open(tmp_path / place)
    (tmp_path / "plain" / "zarr.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"zarr\.json cannot be read"):
        ShardSet.open(tmp_path / "plain")
