"""Shard sets in an object store, spoken to over the S3 protocol on the loopback (moto's server)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet, ShardSetWriter, lease
from matryoshka.shards.lease import LOCK
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_local import LocalStorage
from matryoshka.shards.storage_object import ObjectStorage
from matryoshka.shards.storage_open import open_storage


@pytest.fixture
def bucket(s3_bucket: str) -> Storage:
    """A storage for one set."""
    return open_storage(f"{s3_bucket}/sets/l1")


@pytest.fixture
def remote(bucket: Storage, toy_path: Path) -> Storage:
    """A finished set: `toy_path`, file by file, which takes a tenth of the requests of a writer."""
    for path in toy_path.rglob("*"):
        if path.is_file():
            bucket.publish(str(path.relative_to(toy_path)), path.read_bytes())
    return bucket


def content(storage: Storage) -> dict[str, bytes | None]:
    if isinstance(storage, LocalStorage):
        return {str(p.relative_to(storage.path)): p.read_bytes() for p in storage.path.rglob("*") if p.is_file()}
    assert isinstance(storage, ObjectStorage)
    keys = list(storage._listed(""))
    return dict(zip(keys, storage.read_all(keys), strict=True))


def test_it_holds_what_a_folder_holds(bucket: Storage, toy: Any, toy_path: Path) -> None:
    toy.write(bucket)
    assert content(bucket) == content(LocalStorage(toy_path))


def test_what_other_systems_leave_is_nobodys(remote: Storage) -> None:
    """As in a folder: a set that was copied to a bucket from somebody's disk is still whole."""
    for key in (".DS_Store", "._zarr.json", "manifest/._train-00000.json", "manifest/Thumbs.db"):
        remote.publish(key, b"\0\5\x16\7")
    assert not [name for name in (*remote.list_root(), *remote.keys("manifest")) if "._" in name or ".DS" in name]
    ShardSet.open(remote, verify=True)


@pytest.mark.parametrize("codec", ["compact", "raw", "int8"])
def test_written_is_read(codec: str, make_toy: Any, s3_bucket: str, tmp_path: Path) -> None:
    toy = make_toy(codec)
    url = f"{s3_bucket}/{codec}"
    toy.write(url)
    shards, here = ShardSet.open(url, verify=True), ShardSet.open(toy.write(tmp_path / "set"))
    assert (shards.path, shards.name, shards.digest) == (url, codec, here.digest)
    for split, wanted in ((shards.train, here.train), (shards.val, here.val)):
        for block, other in zip(split.blocks(), wanted.blocks(), strict=True):
            for name in ("tokens", "doc_ids", "source", "target", "keep"):
                assert torch.equal(getattr(block, name), getattr(other, name))
    assert torch.equal(shards.stats("source").mean, here.stats("source").mean)
    assert shards.norm_quantiles("target") == here.norm_quantiles("target")


def test_a_harvest_that_was_cut_off_goes_on(bucket: Storage, toy: Any, toy_path: Path) -> None:
    toy.write_shards(ShardSetWriter.open(bucket, toy.manifest, toy.norm), 4)
    with pytest.raises(UserError, match="s3://.*/sets/l1 is unfinished: it has 4 of 10 shards"):
        ShardSet.open(bucket)
    # A shard whose files are there and whose record is not: the process ended between the two.
    bucket.delete("manifest/train-00002.json")
    writer = ShardSetWriter.open(bucket, toy.manifest, toy.norm)
    assert [writer.is_committed(*piece) for piece in toy.pieces] == [True, True, False, True, *[False] * 6]
    toy.write(bucket)
    assert content(bucket) == content(LocalStorage(toy_path))


def test_other_settings_and_strangers_are_refused(remote: Storage, toy: Any, s3_bucket: str) -> None:
    other = toy.manifest.model_copy(update={"settings": {**toy.manifest.settings, "seed": 7}})
    with pytest.raises(UserError, match="sets/l1 was harvested with other settings"):
        ShardSetWriter.open(remote, other, toy.norm)
    with pytest.raises(UserError, match=r"sets is not empty and not a shard set \(it holds l1\)"):
        ShardSetWriter.open(f"{s3_bucket}/sets", toy.manifest, toy.norm)
    with pytest.raises(UserError, match=r"nothing is not a shard set \(no zarr.json\)"):
        ShardSet.open(f"{s3_bucket}/nothing")


KEYS = ["train/source/c/3/0/0/0", "stats/target/row_norm/c/1/0/0", "val/tokens/c/0/0/0"]


@pytest.mark.parametrize("key", KEYS)
def test_damage_is_found_and_repaired_as_the_message_says(key: str, remote: Storage, toy: Any, toy_path: Path) -> None:
    whole = remote.read(key)
    assert whole is not None
    flipped = bytearray(whole)
    flipped[len(flipped) // 3] ^= 16
    remote.publish(key, bytes(flipped))
    ShardSet.open(remote)
    with pytest.raises(UserError, match=f"differs from its checksum in {key}"):
        ShardSet.open(remote, verify=True)
    remote.publish(key, whole[:-1])
    with pytest.raises(UserError, match=rf"has {len(whole) - 1} bytes in {key}"):
        ShardSet.open(remote)
    remote.delete(key)
    with pytest.raises(UserError, match=f"misses {key}") as refused:
        ShardSet.open(remote)
    (record,) = {word for word in str(refused.value).split() if word.startswith("manifest/")}
    remote.delete(record)
    toy.write(remote)
    assert content(remote) == content(LocalStorage(toy_path))


def test_records_that_point_elsewhere_are_refused(remote: Storage) -> None:
    import json

    record = json.loads(remote.read("manifest/train-00000.json") or b"")
    record["files"]["train/../../secret"] = {"size": 6, "crc32c": 0}
    remote.publish_json("manifest/train-00000.json", record)
    with pytest.raises(UserError, match="points outside the shard set"):
        ShardSet.open(remote)


def test_one_writer_at_a_time(bucket: Storage, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)
    other = open_storage(f"{s3_bucket}/sets/l1")
    with bucket.exclusive(), pytest.raises(UserError, match="is being written by process"), other.exclusive():
        pass
    with other.exclusive():  # given back
        assert other.read(LOCK) is not None
    assert other.read(LOCK) is None


def test_the_lock_of_a_process_that_has_ended_is_taken_over(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.2)
    owner = lease._owner()
    gone = {**owner, "pid": 2**22 + 1, "name": "a"}  # above the largest process number
    for record in (gone, {**gone, "host": "elsewhere"}, {"odd": True}):
        bucket.publish_json(LOCK, record)
        with bucket.exclusive():
            pass
        assert bucket.read(LOCK) is None
    bucket.publish(LOCK, b"no json")
    with bucket.exclusive():
        pass


def test_who_lost_its_lock_commits_nothing(
    bucket: Storage, s3_bucket: str, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    other = open_storage(f"{s3_bucket}/sets/l1")
    with bucket.exclusive():
        writer = ShardSetWriter.open(bucket, toy.manifest, toy.norm)
        toy.write_shards(writer, 1)
        held = next(thread for thread in threading.enumerate() if thread.name == "lease")
        other.publish_json(LOCK, {"name": "somebody else"})
        held.join(10)
        assert not held.is_alive()
        with pytest.raises(UserError, match="was taken over by another process"):
            toy.write_shards(writer, 2)
    assert other.keys("manifest") == [LOCK, "manifest/train-00000.json"]  # the other's lock stays


def test_a_store_without_conditional_puts_is_watched_instead(
    bucket: Storage, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a store would let one writer put its lock over the living one of another."""
    import obstore
    from obstore.exceptions import NotSupportedError

    put = obstore.put

    def plain(client: Any, key: str, content: bytes, **options: Any) -> Any:
        if options.pop("mode", None) is not None:
            raise NotSupportedError("no conditional PUTs")
        return put(client, key, content, **options)

    monkeypatch.setattr(obstore, "put", plain)
    test_one_writer_at_a_time(bucket, s3_bucket, monkeypatch)
    with bucket.exclusive():
        held = next(thread for thread in threading.enumerate() if thread.name == "lease")
        open_storage(f"{s3_bucket}/sets/l1").publish_json(LOCK, {"name": "somebody else"})
        held.join(10)
        assert not held.is_alive()


def test_a_network_that_comes_and_goes_does_not_end_the_beats(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.exceptions import PreconditionError

    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with bucket.exclusive():
        held = next(thread for thread in threading.enumerate() if thread.name == "lease")
        asked = threading.Event()

        def unreachable(_lease: object) -> None:
            asked.set()
            raise UserError("the network is gone")

        def lost_answer(_lease: object, _mode: object) -> None:
            raise PreconditionError("put twice")

        with monkeypatch.context() as gone:
            gone.setattr(lease._Lease, "_seen", unreachable)
            gone.setattr(lease._Lease, "_put", lost_answer)
            assert asked.wait(10)
            held.join(0.2)
            assert held.is_alive()
    assert bucket.read(LOCK) is None


def test_who_was_suspended_asks_before_it_commits(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """No beat comes in this test: the writer itself has to look."""
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.0)
    with bucket.exclusive():
        bucket.guard()  # pyright: ignore[reportAttributeAccessIssue] -- of an ObjectStorage
        bucket.publish_json(LOCK, {"name": "somebody else"})
        with pytest.raises(UserError, match="was taken over by another process"):
            bucket.guard()  # pyright: ignore[reportAttributeAccessIssue] -- of an ObjectStorage
    assert bucket.read(LOCK) is not None


def test_what_cannot_be_reached_is_said_in_one_sentence(s3_bucket: str, toy: Any, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="NoSuchBucket.*Check the URL, the network, and the credentials"):
        ShardSetWriter.open("s3://no-such-bucket/l1", toy.manifest, toy.norm)
    with pytest.raises(UserError, match="foo://bucket/l1 is neither a folder nor the URL of an object store"):
        ShardSet.open("foo://bucket/l1")
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[cloud\]'"):
        ShardSet.open(f"{s3_bucket}/l1")
