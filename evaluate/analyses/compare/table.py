"""The table of a comparison."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ...subject.held_out import rows_of
from ...tables import number, over_documents, with_interval
from .compare import Comparison


def comparison_table(comparison: Comparison) -> ResultTable:
    """One line a transcoder and L0; a dash where a curve does not reach that L0."""
    table = ResultTable(
        title=f"{comparison.n_rows:,} {rows_of(comparison.split, comparison.val_unit)} of {comparison.shard_set}",
        caption="own: at its own threshold. at L0: interpolated on its L0-FVU curve, never beyond it. [95% interval "
        f"{over_documents(comparison.n_documents)}], or +- half of it",
    )
    for name in ("transcoder", "reads", "latents", "own L0", "own FVU"):
        table.add_column(name, left=name in ("transcoder", "reads"), stack="above")
    for name in ("at L0", "FVU", "minus first"):
        table.add_column(name)
    for entry in comparison.entries:
        facts = (entry.name, entry.input, f"{entry.d_sae:,}", f"{entry.l0:.1f}", number(entry.fvu, ".4f"))
        for index, matched in enumerate(entry.matched):
            table.add_row(
                *(facts if index == 0 else ("",) * len(facts)),
                f"{matched.l0:.1f}",
                with_interval(matched.fvu, matched.fvu_interval, ".4f"),
                with_interval(matched.difference, matched.difference_interval, "+.4f"),
            )
    return table
