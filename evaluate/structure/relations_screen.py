"""The tables of `evaluate match` and `evaluate layers`."""

from __future__ import annotations

from rich.table import Table

from ..compare_screen import ROWS_OF
from ..tables import number, result_table
from .layers import Layers
from .matching_file import GroupMatch, Matching


def matching_table(matching: Matching) -> Table:
    """One line a group of each side, then all of its latents."""
    sets = " and ".join(dict.fromkeys(matching.shard_sets))
    table = result_table(
        title=f"{' and '.join(side.name for side in matching.sides)}, on {matching.n_rows:,} {ROWS_OF[matching.split]} "
        f"of {sets}",
        caption=f"of the latents that fired: mean of the largest cosine of decoder rows and of the largest correlation "
        f"of activations with the other side, and the share that reaches {matching.close}. mutual: each the other's "
        "most correlated",
    )
    for name in ("transcoder", "latents", "fired", "cosine", "close", "correlation", "close", "mutual"):
        table.add_column(name, justify="left" if name == "transcoder" else "right", overflow="fold")
    for side in matching.sides:
        groups = [*side.groups, side.total] if len(side.groups) > 1 else [side.total]
        for place, group in enumerate(groups):
            last = place == len(groups) - 1
            table.add_row(side.name if place == 0 else "", *_match_cells(group), end_section=last)
    return table


def layers_table(layers: Layers) -> Table:
    """One line a prefix of each run."""
    table = result_table(
        caption="+-: half the 95% interval of FVU. dead: of the prefix. CE: cross-entropy recovered, target site "
        "zeroed (from `evaluate faithfulness`)",
    )
    for name in ("layer", "run", "shard set", "k", "prefix", "FVU", "+-", "L0", "cosine", "dead", "CE"):
        table.add_column(name, justify="left" if name in ("run", "shard set") else "right", overflow="fold")
    for entry in layers.entries:
        facts = ("-" if entry.layer is None else str(entry.layer), entry.run, entry.shard_set, str(entry.k))
        for place, prefix in enumerate(entry.prefixes):
            half = None if prefix.fvu_interval is None else (prefix.fvu_interval[1] - prefix.fvu_interval[0]) / 2
            table.add_row(
                *(facts if place == 0 else ("",) * len(facts)),
                f"{prefix.prefix_end:,}",
                number(prefix.fvu, ".4f"),
                number(half, ".4f"),
                f"{prefix.l0:.1f}",
                f"{prefix.cosine:.4f}",
                f"{prefix.dead_share:.1%}",
                number(prefix.ce_recovered, ".4f"),
                end_section=place == len(entry.prefixes) - 1,
            )
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
