"""What training shows on the terminal: one table for all runs of a fleet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .member import Entry, Outcome
from .run import FleetResult
from .step import StepReport


@dataclass(slots=True)
class _Line:
    """What the table says of one run."""

    name: str
    n_steps: int
    first: int
    step: int
    outcome: Outcome = "training"
    report: StepReport | None = None


class Screen:
    """A table with step, loss, FVU, L0 and the share of dead latents of every run; use it as a context."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._lines: dict[str, _Line] = {}
        self._began = 0.0
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=1)

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._lines and not self._console.is_terminal:
            self._console.line()  # rich ends the table with one only on a terminal

    def started(self, entries: Sequence[Entry], first_steps: Sequence[int]) -> None:
        """Say what is trained and show the table."""
        for entry, first in zip(entries, first_steps, strict=True):
            plan = entry.plan
            groups = " + ".join(f"{size:,}" for size in plan.group_sizes)
            again = f", going on after step {first}" if first else ""
            self._console.print(
                f"{entry.name}: {plan.d_sae:,} latents in groups {groups}; reads {plan.input}{again}", markup=False
            )
            self._lines[entry.name] = _Line(entry.name, plan.n_steps, first, first)
        self._began = time.monotonic()
        self._live.start()

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:
        """Note the step."""
        line = self._lines[name]
        line.step = step
        line.report = report or line.report

    def ended(self, name: str, outcome: Outcome) -> None:
        """Note the end."""
        self._lines[name].outcome = outcome

    def report(self, result: FleetResult) -> None:
        """Say what is there now."""
        for run in result.runs:
            if run.outcome == "parked":
                text = f"parked: {run.reason}"
            elif run.outcome == "stopped":
                text = f"{run.path}: {run.reason}; the same command again goes on from there"
            elif run.n_steps_taken == 0:
                text = f"{run.path}: nothing left to do ({run.n_steps} steps were taken before)"
            else:
                text = f"{run.path}: {run.n_steps_taken} steps taken, saved in {run.checkpoint}"
            self._console.print(text, markup=False)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("train")
        for title in ("step", "loss", "FVU", "L0", "dead", "left"):
            table.add_column(title, justify="right")
        for line in self._lines.values():
            numbers = ["", "", "", ""]
            if line.report is not None:
                report = line.report
                numbers = [
                    f"{report.loss:.3f}",
                    f"{report.fvu[-1]:.3f}",
                    f"{report.l0:.0f}",
                    f"{100 * report.dead_share:.0f}%",
                ]
            table.add_row(line.name, f"{line.step:,}/{line.n_steps:,}", *numbers, self._left(line))
        return table

    def _left(self, line: _Line) -> str:
        if line.outcome != "training":
            return line.outcome
        if line.step == line.first:
            return ""
        seconds = (time.monotonic() - self._began) / (line.step - line.first) * (line.n_steps - line.step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
