"""What training says at its end: what is there now, and what comes next."""

from __future__ import annotations

from pathlib import Path

from matryoshka.tables import ResultTable
from matryoshka.terminal import next_command, note, show

from .result import FleetResult, TrainResult


def close(result: FleetResult, folder: Path | None, shards: Path | str | None) -> None:
    """Say what a command leaves behind; `folder` is that of a fleet, where the runs are one."""
    if len(result.runs) == 1:
        _say(result.runs[0])
    else:
        show(outcome_table(result))
        for run in result.runs:
            if run.outcome == "diverged":
                note(f"diverged: {run.reason}")
        if any(run.outcome == "stopped" for run in result.runs):
            note("the same command continues from there")
    finished = [run for run in result.runs if run.outcome == "finished"]
    if result.stopped_by is None and finished:
        where = () if shards is None else ("--shards", shards)
        next_command("evaluate", "run", folder or finished[0].path, *where)


def outcome_table(result: FleetResult) -> ResultTable:
    """One line a run."""
    table = ResultTable()
    table.add_column("run", left=True, stack="above")
    table.add_column("outcome", left=True)
    for name, drop in (("steps now", 2), ("of", 1), ("last checkpoint", 0)):
        table.add_column(name, drop=drop)
    for run in result.runs:
        checkpoint = "-" if run.checkpoint is None else run.checkpoint.name
        table.add_row(str(run.path), run.outcome, f"{run.n_steps_taken:,}", f"{run.n_steps:,}", checkpoint)
    return table


def _say(run: TrainResult) -> None:
    if run.outcome == "diverged":
        note(f"diverged: {run.reason}")
    elif run.outcome == "stopped":
        note(f"{run.path}: {run.reason}; the same command continues from there")
    elif run.n_steps_taken == 0:
        note(f"{run.path}: nothing left to do ({run.n_steps} steps were taken before)")
    else:
        note(f"{run.path}: {run.n_steps_taken} steps taken, saved in {run.checkpoint}")
