"""Which weights a RUN means, and which folders are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.checkpoints import expand_fleets, find_checkpoint
from matryoshka.errors import UserError


def test_the_highest_step_counts(made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "l1-k9", made.transcoder(), steps=(90, 1000000))
    made.transcoder().save(run / "checkpoints" / "step-2000000.partial")
    found = find_checkpoint(run)
    assert found.folder == run / "checkpoints" / "step-1000000"
    assert (found.name, found.step, found.is_finished) == ("l1-k9", 1000000, True)
    weights = (found.folder / "transcoder.safetensors").read_bytes()
    assert found.sha256 == hashlib.sha256(weights).hexdigest()


def test_a_run_in_training_is_known_as_such(made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder(), steps=(10, 20), finished=False)
    assert not find_checkpoint(run).is_finished


def test_a_folder_with_weights_is_taken_as_it_is(made: Any, tmp_path: Path) -> None:
    made.transcoder().save(tmp_path / "mine")
    found = find_checkpoint(tmp_path / "mine")
    assert (found.folder, found.step, found.is_finished) == (tmp_path / "mine", None, True)


def test_refusals(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run"):
        find_checkpoint(tmp_path)
    run = made.run(tmp_path / "run", made.transcoder(), steps=(10,))
    (run / "checkpoints" / "step-000010").rename(run / "checkpoints" / "step-000010.partial")
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_checkpoint(run)


def test_a_fleet_means_its_trained_members(made: Any, tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    for name in ("b", "a"):
        made.run(fleet / name, made.transcoder(), steps=(10,))
    (fleet / "waiting").mkdir()
    outside = made.run(tmp_path / "outside", made.transcoder(), steps=(10,))
    record = {"format_version": 1, "members": ["b", "a", "waiting", "../outside"]}
    (fleet / "fleet.json").write_text(json.dumps(record))
    assert expand_fleets([outside, fleet]) == [outside, fleet / "b", fleet / "a"]
    (fleet / "fleet.json").write_text(json.dumps({"format_version": 1, "members": ["waiting"]}))
    with pytest.raises(UserError, match="no member of the fleet"):
        expand_fleets([fleet])
