"""The table of `evaluate match`."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ...subject.held_out import rows_of
from ...tables import number
from .result import GroupMatch, Matching


def matching_table(matching: Matching) -> ResultTable:
    """One line a group of each side, then all of its latents."""
    sets = " and ".join(dict.fromkeys(matching.shard_sets))
    table = ResultTable(
        title=f"{' and '.join(side.name for side in matching.sides)}, on {matching.n_rows:,} "
        f"{rows_of(matching.split, matching.val_unit)} of {sets}",
        caption=f"of the latents that fired: mean of the largest cosine of decoder rows and of the largest correlation "
        f"of activations with the other side, and the share that reaches {matching.close}. mutual: each the other's "
        "most correlated",
    )
    table.add_column("transcoder", left=True, stack="above")
    for name in ("latents", "fired", "cosine", "close", "correlation", "close", "mutual"):
        table.add_column(name)
    for side in matching.sides:
        groups = [*side.groups, side.total] if len(side.groups) > 1 else [side.total]
        for index, group in enumerate(groups):
            last = index == len(groups) - 1
            table.add_row(side.name if index == 0 else "", *_match_cells(group), ends_section=last)
    return table


def _match_cells(group: GroupMatch) -> list[str]:
    return [
        f"{group.n_latents:,}",
        f"{group.n_alive:,}",
        number(group.mean_max_cosine, ".3f"),
        number(group.share_close_cosine, ".0%"),
        number(group.mean_max_correlation, ".3f"),
        number(group.share_close_correlation, ".0%"),
        number(group.share_mutual, ".0%"),
    ]
