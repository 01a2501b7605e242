"""The tables of report.json on the terminal: the prefixes of a run, or a line for each of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka.tables import ResultTable

from ...tables import number, over_documents, run_and_step
from .result import Report


def runs_table(reports: Sequence[Report]) -> ResultTable:
    """One line a run, with all of its latents."""
    rows = {report.shard_set.rows for report in reports}
    sets = {report.shard_set.name for report in reports}
    table = ResultTable(
        title=f"{len(reports)} runs, on {' and '.join(sorted(rows))} of {', '.join(sorted(sets))}",
        caption=f"all groups together. +-: half the 95% interval of FVU, "
        f"{over_documents(*(report.n_documents for report in reports))}. `evaluate run` of one run shows its prefixes",
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
    rows = f"{report.n_rows:,} {report.shard_set.rows}"
    table = ResultTable(
        title=f"{run_and_step(report.transcoder)}{alone}, on {rows} of {report.shard_set.name}",
        caption=f"+-: half the 95% interval of FVU, {over_documents(report.n_documents)}. {_batch_topk(report)}dead, "
        "dense: of the group",
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


def _batch_topk(report: Report) -> str:
    """Which batches BatchTopK chose in."""
    if report.batch_topk is None:
        return ""
    if report.batch_topk_rows is None:
        return "top-k: FVU with BatchTopK. "
    of = "those of training" if report.batch_topk_as_trained else "those of training are not known"
    return f"top-k: FVU with BatchTopK in batches of {report.batch_topk_rows:,} rows ({of}). "
