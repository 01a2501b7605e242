"""What a result is of, and how it and its tables appear together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluate.config import EvaluateConfig
from evaluate.result import Result, ShardSetFacts, TranscoderFacts, default_folder, result_folder
from matryoshka.checkpoints import find_checkpoint
from matryoshka.shards import ShardSet


class Found(Result):
    """A number and one or two tables."""

    FILE = "inner/found.json"
    TABLES = ("first.parquet", "second.parquet")

    n: int
    both: bool = True

    def tables(self) -> tuple[str, ...]:
        return self.TABLES if self.both else self.TABLES[:1]


@pytest.fixture
def found(val_set: ShardSet, made: Any, tmp_path: Path) -> Found:
    transcoder = made.transcoder()
    checkpoint = find_checkpoint(made.run(tmp_path / "run", transcoder))
    facts = {"transcoder": TranscoderFacts.of(checkpoint, transcoder), "shard_set": ShardSetFacts.of(val_set)}
    return Found(**facts, settings={"seed": 0}, n=3)


def publish(result: Found, folder: Path, text: str) -> None:
    """With tables that say `text`."""
    made = folder / "made"
    made.mkdir(parents=True)
    (folder / "inner").mkdir(exist_ok=True)
    for table in result.tables():
        (made / table).write_text(text)
    result.publish(folder / result.FILE, made)
    made.rmdir()


def test_a_result_knows_what_it_is_of(found: Found, val_set: ShardSet, tmp_path: Path) -> None:
    sha256 = find_checkpoint(tmp_path / "run").sha256
    assert found.identity() == {
        "transcoder": {"step": 400, "sha256": sha256},
        "shard_set": {"digest": val_set.digest},
        "settings": {"seed": 0},
    }


def test_it_is_read_with_its_tables(found: Found, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert Found.read(folder) is None
    publish(found, folder, "old")
    assert Found.read(folder) == found
    # One that has no second table takes an older one's away.
    other = found.model_copy(update={"n": 4, "both": False})
    publish(other, folder, "new")
    assert Found.read(folder) == other
    assert {path.name for path in (folder / "inner").iterdir()} == {"found.json", "first.parquet"}
    assert (folder / "inner" / "first.parquet").read_text() == "new"
    (folder / "inner" / "first.parquet").unlink()
    assert Found.read(folder) is None


def test_no_moment_shows_a_result_with_the_tables_of_another(
    found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    publish(found, folder, "old")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluate.result.publish_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        publish(found.model_copy(update={"n": 4}), folder, "new")
    assert Found.read(folder) is None


def test_folders(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(made.run(tmp_path / "run", made.transcoder()))
    top = tmp_path / "run" / "eval" / f"l1-{val_set.digest[:8]}"
    assert default_folder(checkpoint, val_set) == top
    for changes, folder in (
        ({}, top),
        ({"split": "train"}, top / "train"),
        ({"prefix": 2}, top / "prefix-2"),
        ({"split": "train", "prefix": 1}, top / "train" / "prefix-1"),
        ({"prefix": 1, "out": tmp_path / "out"}, tmp_path / "out"),
    ):
        assert result_folder(checkpoint, val_set, EvaluateConfig(**changes)) == folder
