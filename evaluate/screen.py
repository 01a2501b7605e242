"""What an evaluation shows on the terminal: a bar while it runs, then a table per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from matryoshka.progress import ProgressDisplay
from matryoshka.tables import ResultTable
from matryoshka.terminal import note, show

from .analysis import Analysis, Answer, ResultT
from .checkpoint import Checkpoint
from .compare_screen import ROWS_OF
from .probing.measured import Measured
from .report.build import Pages
from .report_file import Report
from .run import Evaluation
from .tables import number, run_and_step


class Screen:
    """Progress and notes go to stderr, tables to stdout; use it as a context."""

    def __init__(self, what: str = "evaluate") -> None:
        self._display = ProgressDisplay(what, "rows")
        self._name, self._n_done = "", 0

    def __enter__(self) -> Screen:
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
        """Print something to know."""
        note(text)

    def report(self, evaluations: list[Evaluation]) -> None:
        """Print the table of a run, or one of several, and say where the reports lie."""
        if len(evaluations) == 1:
            show(prefix_table(evaluations[0].report))
        else:
            show(runs_table([evaluation.report for evaluation in evaluations]))
        for evaluation in evaluations:
            self._unfinished(evaluation.checkpoint)
            if evaluation.replaced:
                note(f"{evaluation.checkpoint.name}: replaced an older report ({'; '.join(evaluation.replaced)})")
            self._resumed(evaluation.n_resumed)
        if len(evaluations) == 1:
            (one,) = evaluations
            note(f"{one.path}: {'written' if one.is_new else 'nothing left to do, this report was there already'}")
        else:
            n_new = sum(evaluation.is_new for evaluation in evaluations)
            note(f"{n_new} reports written, {len(evaluations) - n_new} were there already")

    def say(self, analysis: Analysis[ResultT], answers: Sequence[Answer[ResultT]]) -> None:
        """Print what was found, how older results differed, and where all of it is."""
        for table in analysis.tables([one.result for one in answers]):
            show(table)
        for one in answers:
            name = "" if len(answers) == 1 else f"{one.checkpoint.name}: "
            for sentence in analysis.notes(one.result):
                note(name + sentence)
            self._unfinished(one.checkpoint)
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
            note(f"went on after {n_done:,} {unit} that an earlier command had done")

    def pages(self, pages: Pages) -> None:
        """Say where the pages lie and how to open them."""
        for sentence in pages.notes:
            note(sentence)
        note(f"{pages.index}: written; open {pages.index.resolve().as_uri()}")

    def table(self, table: ResultTable, path: Path | None) -> None:
        """Print a table, and where its numbers lie."""
        show(table)
        if path is not None:
            note(f"{path}: written")

    def measured(self, table: ResultTable, measured: Measured[Any]) -> None:
        """Print the table of a result of its own, how an older one differed, and where it lies."""
        show(table)
        self._unfinished(measured.checkpoint)
        if measured.replaced:
            note(f"replaced an older result ({'; '.join(measured.replaced)})")
        state = "written" if measured.is_new else "nothing left to do, this result was there already"
        note(f"{measured.path}: {state}")


def runs_table(reports: list[Report]) -> ResultTable:
    """One line a run, with all of its latents."""
    splits = {report.shard_set.split for report in reports}
    sets = {report.shard_set.name for report in reports}
    table = ResultTable(
        title=f"{len(reports)} runs, on {' and '.join(ROWS_OF[split] for split in sorted(splits))} of "
        f"{', '.join(sorted(sets))}",
        caption="all groups together. +-: half the 95% interval of FVU. `evaluate run` of one run shows its prefixes",
    )
    table.add_column("run", left=True, stack="above")
    for name, drop in (("latents", 0), ("k", 0), ("FVU", 0), ("+-", 0), ("L0", 0)):
        table.add_column(name, drop=drop)
    for name, drop in (("cosine", 3), ("dead", 0), ("dense", 2), ("rows", 4)):
        table.add_column(name, drop=drop)
    for report in reports:
        last, intervals = report.threshold[-1], report.spread.fvu_interval
        table.add_row(
            report.transcoder.run,
            f"{report.total.n_latents:,}",
            str(report.transcoder.config["k"]),
            number(last.fvu, ".4f"),
            "" if intervals is None else f"{(intervals[-1][1] - intervals[-1][0]) / 2:.4f}",
            number(last.l0, ".1f"),
            number(last.cosine, ".4f"),
            f"{report.total.dead_share:.1%}",
            f"{report.total.dense_share:.1%}",
            f"{report.n_rows:,}",
        )
    return table


def prefix_table(report: Report) -> ResultTable:
    """One line a nested prefix, then the latents of all groups together."""
    n_groups = report.settings.get("prefix")
    alone = "" if n_groups is None else f", its first {n_groups} groups alone"
    rows = f"{report.n_rows:,} {ROWS_OF[report.shard_set.split]}"
    table = ResultTable(
        title=f"{run_and_step(report.transcoder)}{alone}, on {rows} of {report.shard_set.name}",
        caption="+-: half the 95% interval of FVU. top-k: FVU with BatchTopK as in training. dead, dense: of the group",
    )
    total, prefixes, groups = report.total, report.threshold, report.groups
    columns = {
        "group": (f"{total.n_latents:,}", [f"{group.n_latents:,}" for group in groups]),
        "prefix": ("", [f"{prefix.prefix_end:,}" for prefix in prefixes]),
        "FVU": ("", [number(prefix.fvu, ".4f") for prefix in prefixes]),
        "+-": ("", [f"{(high - low) / 2:.4f}" for low, high in report.spread.fvu_interval or ()]),
        "L0": ("", [number(prefix.l0, ".1f") for prefix in prefixes]),
        "top-k": ("", [number(prefix.fvu, ".4f") for prefix in report.batch_topk or ()]),
        "cosine": ("", [number(prefix.cosine, ".4f") for prefix in prefixes]),
        "norm": ("", [number(prefix.norm_ratio, ".3f") for prefix in prefixes]),
        "dead": (f"{total.dead_share:.1%}", [f"{group.dead_share:.1%}" for group in groups]),
        "dense": (f"{total.dense_share:.1%}", [f"{group.dense_share:.1%}" for group in groups]),
    }
    shown = {name: column for name, column in columns.items() if column[1]}
    for name in shown:
        table.add_column(name, drop={"cosine": 1, "dense": 2, "norm": 3}.get(name, 0))
    table.footer = tuple(footer for footer, _ in shown.values())
    for cells in zip(*(cells for _, cells in shown.values()), strict=True):
        table.add_row(*cells)
    return table
