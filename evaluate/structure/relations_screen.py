"""The tables of `evaluate match` and `evaluate layers`."""

from __future__ import annotations

from rich import box
from rich.table import Table

from ..compare_screen import ROWS_OF
from .layers import Layers
from .matching_file import GroupMatch, Matching


def matching_table(matching: Matching) -> Table:
    """One line a group of each side, then all of its latents."""
    sets = " and ".join(dict.fromkeys(matching.shard_sets))
    table = Table(
        title=f"{' and '.join(side.name for side in matching.sides)}, on {matching.n_rows:,} {ROWS_OF[matching.split]} "
        f"of {sets}",
        caption=f"of the latents that fired: mean of the largest cosine of decoder rows and of the largest correlation "
        f"of activations with the other side, and the share that reaches {matching.close}. mutual: each the other's "
        "most correlated",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
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
    table = Table(
        caption="+-: half the 95% interval of FVU. dead: of the prefix. CE: cross-entropy recovered, target site "
        "zeroed (from `evaluate faithfulness`)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
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
                _number(prefix.fvu, 4),
                _number(half, 4),
                f"{prefix.l0:.1f}",
                f"{prefix.cosine:.4f}",
                f"{prefix.dead_share:.1%}",
                _number(prefix.ce_recovered, 4),
                end_section=place == len(entry.prefixes) - 1,
            )
    return table


def _match_cells(group: GroupMatch) -> list[str]:
    return [
        f"{group.n_latents:,}",
        f"{group.n_alive:,}",
        _number(group.mean_max_cosine, 3),
        _percent(group.share_close_cosine),
        _number(group.mean_max_correlation, 3),
        _percent(group.share_close_correlation),
        _percent(group.share_mutual),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
