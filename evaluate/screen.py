"""What an evaluation shows on the terminal: a bar while it runs, then a table per run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .checkpoint import Checkpoint
from .compare_screen import ROWS_OF
from .probing.measured import Measured
from .report.build import Pages
from .report_file import Report
from .run import Evaluation
from .samples import Sampled
from .structure.hierarchy import Structured
from .structure.hierarchy_screen import clusters_line, group_table
from .tables import number, result_table, run_and_step


class Screen:
    """Progress and notes go to stderr, tables to stdout; use it as a context."""

    def __init__(self, what: str = "evaluate") -> None:
        self._what = what
        self._console = Console(stderr=True)
        self._output = Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def started(self, name: str, n_rows: int) -> None:
        """Show a bar for one run."""
        # Not before there is something to show: a bar that never had a task leaves an empty line.
        self._bar.start()
        self._task = self._bar.add_task(f"{self._what} {name}", total=n_rows, rate="")

    def advanced(self, n_rows: int) -> None:
        """Move the bar."""
        assert self._task is not None
        self._bar.advance(self._task, n_rows)
        speed = self._bar.tasks[-1].speed
        self._bar.update(self._task, rate="" if speed is None else f"{speed:,.0f} rows/s")

    def noted(self, text: str) -> None:
        """Print something to know."""
        self._console.print(text, markup=False)

    def report(self, evaluations: list[Evaluation]) -> None:
        """Print the table of each run and say where its report lies."""
        for evaluation in evaluations:
            self._output.print(prefix_table(evaluation.report))
            self._unfinished(evaluation.checkpoint)
            if evaluation.replaced:
                self._console.print(f"replaced an older report ({'; '.join(evaluation.replaced)})", markup=False)
            self._resumed(evaluation.n_resumed)
            state = "written" if evaluation.is_new else "nothing left to do, this report was there already"
            self._console.print(f"{evaluation.path}: {state}", markup=False)

    def sampled(self, sampled: Sampled) -> None:
        """Say where the samples of a run lie and what was left to do."""
        mark = sampled.mark
        if mark.split == "train":
            self._console.print(
                f"[yellow]{mark.transcoder.run}: the windows are of train rows, which the transcoder has seen; "
                "they may show what it learned by heart"
            )
        if sampled.replaced:
            self._console.print(f"replaced older samples ({'; '.join(sampled.replaced)})", markup=False)
        self._resumed(sampled.n_resumed)
        state = (
            f"{mark.n_windows:,} windows from {mark.n_rows:,} {mark.split} rows"
            if sampled.is_new
            else "nothing left to do, these samples were there already"
        )
        self._console.print(f"{sampled.path}: {state}", markup=False)

    def _unfinished(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.is_finished:
            self._console.print(
                f"[yellow]{checkpoint.name} is not trained to its end: this is step {checkpoint.step:,}, its "
                "threshold a moving average, not yet calibrated"
            )

    def _resumed(self, n_rows: int) -> None:
        if n_rows > 0:
            self._console.print(f"went on after {n_rows:,} rows that an earlier command had done", markup=False)

    def structured(self, structured: Structured) -> None:
        """Print what each group adds, and where the tables lie."""
        self._output.print(group_table(structured.hierarchy))
        self._console.print(clusters_line(structured.hierarchy), markup=False)
        if structured.replaced:
            self._console.print(f"replaced an older hierarchy ({'; '.join(structured.replaced)})", markup=False)
        self._resumed(structured.n_resumed)
        state = "written" if structured.is_new else "nothing left to do, this hierarchy was there already"
        self._console.print(f"{structured.path}: {state}", markup=False)

    def pages(self, pages: Pages) -> None:
        """Say where the pages lie and how to open them."""
        for note in pages.notes:
            self._console.print(note, markup=False)
        self._console.print(f"{pages.index}: written; open {pages.index.resolve().as_uri()}", markup=False)

    def table(self, table: Table, path: Path | None) -> None:
        """Print a table, and where its numbers lie."""
        self._output.print(table)
        if path is not None:
            self._console.print(f"{path}: written", markup=False)

    def measured(self, table: Table, measured: Measured[Any]) -> None:
        """Print the table of a result of its own, how an older one differed, and where it lies."""
        self._output.print(table)
        self._unfinished(measured.checkpoint)
        if measured.replaced:
            self._console.print(f"replaced an older result ({'; '.join(measured.replaced)})", markup=False)
        state = "written" if measured.is_new else "nothing left to do, this result was there already"
        self._console.print(f"{measured.path}: {state}", markup=False)


def prefix_table(report: Report) -> Table:
    """One line a nested prefix, then the latents of all groups together."""
    n_groups = report.settings.get("prefix")
    alone = "" if n_groups is None else f", its first {n_groups} groups alone"
    rows = f"{report.n_rows:,} {ROWS_OF[report.shard_set.split]}"
    table = result_table(
        title=f"{run_and_step(report.transcoder)}{alone}, on {rows} of {report.shard_set.name}",
        caption="+-: half the 95% interval of FVU. top-k: FVU with BatchTopK as in training. dead, dense: of the group",
        show_footer=True,
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
    for name, (footer, _) in shown.items():
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
    for cells in zip(*(cells for _, cells in shown.values()), strict=True):
        table.add_row(*cells)
    return table
