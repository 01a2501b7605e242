"""What training tells of itself while it works, and the display of it: one for all runs of a fleet."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from matryoshka.progress import ProgressDisplay, in_notebook
from matryoshka.terminal import note

from .member import Outcome, PlannedRun
from .step.step import StepReport

_MANY = 4
"""Runs of which more are not introduced one by one."""


class Progress(Protocol):
    """Somebody who is told."""

    def started(self, planned_runs: Sequence[PlannedRun], first_steps: Sequence[int]) -> None:
        """The first step of the runs that are not finished is about to be taken."""
        ...

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:
        """A run has finished `step` steps; a report comes with every logged one."""
        ...

    def ended(self, name: str, outcome: Outcome) -> None:
        """A run takes no more steps."""
        ...


class NoProgress:
    """Progress for nobody."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def started(self, planned_runs: Sequence[PlannedRun], first_steps: Sequence[int]) -> None:
        """Say nothing."""

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:
        """Say nothing."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """Say nothing."""


class TrainDisplay:
    """Steps, loss, FVU, the share of dead latents and L0 of every run; use it as a context."""

    def __init__(self) -> None:
        facts = {"loss": "{:.3f}".format, "FVU": "{:.3f}".format, "dead": "{:.0%}".format, "L0": "{:.0f}".format}
        self._display = ProgressDisplay("train", "steps", facts)

    def __enter__(self) -> TrainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, traceback)

    def started(self, planned_runs: Sequence[PlannedRun], first_steps: Sequence[int]) -> None:
        """Say what is trained and show it."""
        for planned, first in zip(planned_runs, first_steps, strict=True):
            again = f", continuing after step {first:,}" if first else ""
            if len(planned_runs) <= _MANY:
                plan = planned.plan
                groups = " + ".join(f"{size:,}" for size in plan.group_sizes)
                note(f"{planned.name}: {plan.d_sae:,} latents in groups {groups}; reads {plan.input}{again}")
        if len(planned_runs) > _MANY:
            n_continued = sum(first > 0 for first in first_steps)
            note(f"{len(planned_runs)} runs, {n_continued} of them continuing from a checkpoint")
        for planned, first in zip(planned_runs, first_steps, strict=True):
            self._display.add(planned.name, planned.plan.n_steps, first)

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:
        """Note the step."""
        facts = {}
        if report is not None:
            facts = {"loss": report.loss, "FVU": report.fvu[-1], "dead": report.dead_share, "L0": report.l0}
        self._display.update(name, step, facts)

    def ended(self, name: str, outcome: Outcome) -> None:
        """Note the end."""
        self._display.end(name, outcome)


def usual_progress() -> TrainDisplay | NoProgress:
    """For a training that Python code starts: bars in a notebook, else nothing."""
    return TrainDisplay() if in_notebook() else NoProgress()
