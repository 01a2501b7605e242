"""What a training run shows on the terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .plan import Plan
from .run import TrainResult
from .step import StepReport


class Screen:
    """A progress bar with loss, FVU, L0 and the share of dead latents; use it as a context."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("train", total=None, numbers="")

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, plan: Plan, first_step: int) -> None:
        """Say what is trained and show the bar."""
        groups = " + ".join(f"{size:,}" for size in plan.group_sizes)
        again = f", going on after step {first_step}" if first_step else ""
        self._console.print(f"{plan.d_sae:,} latents in groups {groups}; reads {plan.input}{again}")
        self._bar.update(self._task, total=plan.n_steps, completed=first_step)
        self._bar.start()

    def advanced(self, step: int, report: StepReport | None) -> None:
        """Move the bar."""
        if report is None:
            self._bar.update(self._task, completed=step)
            return
        numbers = (
            f"loss {report.loss:.3f}  FVU {report.fvu[-1]:.3f}  L0 {report.l0:.0f}  dead {100 * report.dead_share:.0f}%"
        )
        self._bar.update(self._task, completed=step, numbers=numbers)

    def report(self, result: TrainResult) -> None:
        """Say what is there now."""
        if result.n_steps_taken == 0:
            self._console.print(f"{result.path}: nothing left to do ({result.n_steps} steps were taken before)")
        else:
            self._console.print(f"{result.path}: {result.n_steps_taken} steps taken, saved in {result.checkpoint}")
