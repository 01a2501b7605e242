"""Which shard set a run is measured on when none is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluate.subject.shard_set import names_shards, open_shards
from matryoshka.checkpoints import find_checkpoint
from matryoshka.errors import UserError
from matryoshka.runs import publish_json


def trained_on(run: Path, shards: str) -> None:
    """Change what run.json says, and nothing else."""
    record = json.loads((run / "run.json").read_text())
    publish_json(run / "run.json", {**record, "config": {"shards": shards}})


def test_it_is_found_from_here_and_from_above_the_run(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = made.shards(tmp_path / "lab" / "data" / "l1")
    run = made.run(tmp_path / "lab" / "data" / "runs" / "l1-k9", made.transcoder(), shards=shards)
    trained_on(run, "data/l1")
    (tmp_path / "elsewhere").mkdir()
    for cwd, path in ((tmp_path / "lab", run.relative_to(tmp_path / "lab")), (tmp_path / "elsewhere", run)):
        monkeypatch.chdir(cwd)
        notes: list[str] = []
        assert open_shards(find_checkpoint(path), None, notes.append).digest == shards.digest
        (note,) = notes
        assert note.startswith("l1-k9: on ")
        assert note.endswith("data/l1, the shard set that it was trained on")


def test_the_set_that_is_named_is_taken_as_it_is(made: Any, tmp_path: Path) -> None:
    shards, other = made.shards(tmp_path / "l1"), made.shards(tmp_path / "l2", seed=5)
    checkpoint = find_checkpoint(made.run(tmp_path / "run", made.transcoder(), shards=shards))
    notes: list[str] = []
    assert open_shards(checkpoint, other.path, notes.append).digest == other.digest
    assert notes == []


def test_a_set_that_is_gone_or_is_another_one_is_refused(made: Any, tmp_path: Path) -> None:
    shards, other = made.shards(tmp_path / "l1"), made.shards(tmp_path / "l2", seed=5)
    run = made.run(tmp_path / "run", made.transcoder(), shards=shards)
    checkpoint = find_checkpoint(run)
    trained_on(run, str(tmp_path / "l3"))
    with pytest.raises(UserError, match=r"was trained on .*l3, and no shard set is there any more; name .* --shards"):
        open_shards(checkpoint, None, print)
    trained_on(run, str(other.path))
    with pytest.raises(UserError, match=r"l2 is not as it was when .*run was trained on it .* pass --shards .*l2"):
        open_shards(checkpoint, None, print)


@pytest.mark.parametrize("record", [{}, {"config": []}, {"config": {"shards": None}}, {"config": {"shards": 3}}])
def test_a_run_that_does_not_say(made: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    publish_json(run / "run.json", {"format_version": 1, **record})
    assert not names_shards(run)
    with pytest.raises(UserError, match="no shard set was named"):
        open_shards(find_checkpoint(run), None, print)


def test_bare_weights_belong_to_no_run(made: Any, tmp_path: Path) -> None:
    made.transcoder().save(tmp_path / "mine")
    assert not names_shards(tmp_path / "mine")
