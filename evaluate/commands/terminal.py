"""What an evaluation shows on the terminal: a bar while it runs, then a table per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from matryoshka.checkpoints import Checkpoint
from matryoshka.progress import ProgressDisplay
from matryoshka.tables import ResultTable
from matryoshka.terminal import note, show

from ..analyses import load_analysis
from ..analysis import Analysis, Answer, ResultT, answer
from ..config import EvaluateConfig
from ..report.build import Pages


class Terminal:
    """Progress and notes go to stderr, tables to stdout; use it as a context."""

    def __init__(self, what: str = "evaluate") -> None:
        self._display = ProgressDisplay(what, "rows")
        self._name, self._n_done = "", 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, traceback)

    def started(self, name: str, n_rows: int) -> None:
        """Show a bar for one run."""
        self._name, self._n_done = name, 0
        self._display.replace(name, n_rows)

    def advanced(self, n_rows: int) -> None:
        """Move the bar."""
        self._n_done += n_rows
        self._display.update(self._name, self._n_done)

    def noted(self, text: str) -> None:
        """Print something to know, above the bar where there is one."""
        note(text, to=self._display.console)

    def say(self, analysis: Analysis[ResultT], answers: Sequence[Answer[ResultT]]) -> None:
        """Print what was found, how older results differed, and where all of it is."""
        for table in analysis.tables([one.result for one in answers]):
            show(table)
        for checkpoint in {one.checkpoint.folder: one.checkpoint for one in answers}.values():
            self._unfinished(checkpoint)
        for one in answers:
            name = "" if len(answers) == 1 else f"{one.checkpoint.name}: "
            for sentence in analysis.notes(one.result):
                note(name + sentence)
            if one.replaced:
                note(f"{name}replaced an older result ({'; '.join(one.replaced)})")
            self._resumed(one.n_resumed, analysis.unit)
        if len(answers) == 1:
            (one,) = answers
            note(f"{one.path}: {'written' if one.is_new else 'nothing left to do, this result was there already'}")
        else:
            n_new = sum(one.is_new for one in answers)
            note(f"{n_new} results written, {len(answers) - n_new} were there already")

    def _unfinished(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.is_finished:
            note(
                f"{checkpoint.name} is not trained to its end: this is step {checkpoint.step:,}, its threshold a "
                "moving average, not yet calibrated",
                warning=True,
            )

    def _resumed(self, n_done: int, unit: str = "rows") -> None:
        if n_done > 0:
            note(f"continued after {n_done:,} {unit} of an earlier command")

    def pages(self, pages: Pages) -> None:
        """Print where the pages are and how to open them."""
        for sentence in pages.notes:
            note(sentence)
        note(f"{pages.index}: written; open {pages.index.resolve().as_uri()}")

    def table(self, table: ResultTable, path: Path | None) -> None:
        """Print a table, and the file of its numbers."""
        show(table)
        if path is not None:
            note(f"{path}: written")


def measure(name: str, runs: Sequence[Path], config: EvaluateConfig, **arguments: Any) -> None:
    """What the command of an analysis does: make its results or read them, and say what they are."""
    analysis = load_analysis(name)(**arguments)
    with Terminal("evaluate" if name == "run" else name) as terminal:
        answers = answer(analysis, runs, config, terminal)
    terminal.say(analysis, answers)
