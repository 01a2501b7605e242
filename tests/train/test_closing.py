"""What training says at its end, and the next command."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest

from train.closing import close
from train.result import FleetResult, TrainResult


def run(name: str, **facts: object) -> TrainResult:
    path = Path("data/my runs") / name
    return TrainResult(path, path / "checkpoints" / "step-000400", 400, 400, **facts)  # pyright: ignore


def test_one_run_ends_with_the_command_that_evaluates_it(capsys: pytest.CaptureFixture[str]) -> None:
    close(FleetResult((run("l1-k6"),), None), None, Path("data/it's l1"))
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert shlex.split(last) == ["next:", "evaluate", "run", "data/my runs/l1-k6", "--shards", "data/it's l1"]


def test_thirty_runs_end_with_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    runs = (*(run(f"k{k}") for k in range(30)), run("bad", outcome="diverged", reason="loss is nan"))
    close(FleetResult(runs, None), Path("data/fleet"), Path("data/l1"))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + 31
    assert all(f"k{k} " in out for k in range(30))
    assert err.splitlines() == ["diverged: loss is nan", "next: evaluate run data/fleet --shards data/l1"]


def test_a_run_that_was_stopped_is_not_to_be_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = run("l1-k6", outcome="stopped", reason="stopped after step 3 of 400")
    close(FleetResult((stopped,), signal.SIGINT), None, None)
    assert "next:" not in capsys.readouterr().err
