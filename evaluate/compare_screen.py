"""The table of a comparison."""

from __future__ import annotations

from rich.table import Table

from .compare import Comparison
from .tables import number, result_table

ROWS_OF = {"val": "held-out rows", "train": "TRAIN rows (seen in training)"}
"""What a table calls the rows of a split."""


def comparison_table(comparison: Comparison) -> Table:
    """One line a transcoder and L0; a dash where a curve does not reach that L0."""
    table = result_table(
        title=f"{comparison.n_rows:,} {ROWS_OF[comparison.split]} of {comparison.shard_set}",
        caption="own: at its own threshold. at L0: interpolated on its L0-FVU curve, never beyond it. [95% interval]",
        narrow=False,
    )
    for name in ("transcoder", "reads", "latents", "own L0", "own FVU", "at L0", "FVU", "minus first"):
        table.add_column(name, justify="left" if name in ("transcoder", "reads") else "right", overflow="fold")
    for entry in comparison.entries:
        facts = (entry.name, entry.input, f"{entry.d_sae:,}", f"{entry.l0:.1f}", number(entry.fvu, ".4f"))
        for place, matched in enumerate(entry.matched):
            table.add_row(
                *(facts if place == 0 else ("",) * len(facts)),
                f"{matched.l0:.1f}",
                _with_interval(matched.fvu, matched.fvu_interval),
                _with_interval(matched.difference, matched.difference_interval),
            )
    return table


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    shown = number(value, ".4f")
    return shown if interval is None else f"{shown} [{interval[0]:.4f}, {interval[1]:.4f}]"
