"""Folders and URLs: what a user may write, and what it is taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluate.config import EvaluateConfig
from harvest.config import HarvestConfig
from matryoshka.locations import inside, location, location_name
from matryoshka.runs import default_run_path
from train.config import TrainConfig


@pytest.mark.parametrize(
    ("text", "wanted", "name"),
    [
        ("data/l17", Path("data/l17"), "l17"),
        ("/data/l17/", Path("/data/l17"), "l17"),
        ("s3://bucket/sets/l17", "s3://bucket/sets/l17", "l17"),
        ("s3://bucket/sets/l17/", "s3://bucket/sets/l17", "l17"),
        ("gs://bucket", "gs://bucket", "bucket"),
        ("file:///data/my%20sets/l17", Path("/data/my sets/l17"), "l17"),
        (Path("s3://bucket/l17"), "s3://bucket/l17", "l17"),  # as an option of type Path would hand it on
        ("c:/l17", Path("c:/l17"), "l17"),
    ],
)
def test_what_text_is_taken_for(text: str | Path, wanted: Path | str, name: str) -> None:
    assert location(text) == wanted
    assert type(location(text)) is type(wanted)
    assert location_name(text) == name
    # beside a set in a folder; of one in an object store in data/
    parent = wanted.parent if isinstance(wanted, Path) else Path("data")
    assert default_run_path(text, 96) == parent / "runs" / f"{name}-k96"


def test_a_run_is_never_inside_its_shard_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "l3" / "val").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "l3")
    assert default_run_path(".", 4) == tmp_path / "runs" / "l3-k4"
    monkeypatch.chdir(tmp_path / "l3" / "val")
    assert default_run_path("..", 4) == tmp_path / "runs" / "l3-k4"


def test_places_inside() -> None:
    assert inside("data", "l3") == Path("data/l3")
    assert inside("s3://bucket/sets/", "l3") == "s3://bucket/sets/l3"


def test_settings_take_both() -> None:
    for config in (TrainConfig, EvaluateConfig):
        for text, wanted in (("s3://b/l1", "s3://b/l1"), ("data/l1", Path("data/l1"))):
            read = config.model_validate({"shards": text})
            assert read.shards == wanted
            assert read.model_dump(mode="json")["shards"] == text
    several = HarvestConfig.model_validate({"layers": "3,5", "out": "s3://b/sets"})
    assert [member.folder() for member in several.members()] == ["s3://b/sets/l3", "s3://b/sets/l5"]
    form = HarvestConfig.model_validate({"layers": "3,5", "out": "gs://b/{layer}/x"})
    assert [member.folder() for member in form.members()] == ["gs://b/3/x", "gs://b/5/x"]
    assert HarvestConfig.model_validate({"layer": 3, "out": "s3://b/x"}).folder() == "s3://b/x"
