"""The tables of `evaluate match` and `evaluate layers`."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ..bootstrap import over_documents
from ..held_out import rows_of
from ..tables import number
from .layers import Layers
from .matching_file import GroupMatch, Matching


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
        for place, group in enumerate(groups):
            last = place == len(groups) - 1
            table.add_row(side.name if place == 0 else "", *_match_cells(group), ends_section=last)
    return table


def layers_table(layers: Layers) -> ResultTable:
    """One line a prefix of each run."""
    table = ResultTable(
        caption="+-: half the 95% interval of FVU, "
        f"{over_documents(*(entry.n_documents for entry in layers.entries))}. dead: of the prefix. CE: cross-entropy "
        "recovered, target site zeroed (from `evaluate faithfulness`)",
    )
    for name in ("run", "shard set", "layer", "k"):
        table.add_column(name, left=name in ("run", "shard set"), stack="above")
    for name in ("prefix", "FVU", "+-", "L0", "cosine", "dead", "CE"):
        table.add_column(name, drop=1 if name == "cosine" else 0)
    for entry in layers.entries:
        facts = (entry.run, entry.shard_set, "-" if entry.layer is None else str(entry.layer), str(entry.k))
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
                ends_section=place == len(entry.prefixes) - 1,
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
