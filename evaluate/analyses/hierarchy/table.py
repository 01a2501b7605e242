"""The tables of a hierarchy on the terminal."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ...tables import number, run_and_step
from .result import IMPLIED, GroupGain, Hierarchy


def group_table(hierarchy: Hierarchy) -> ResultTable:
    """One line a group: what it adds to those before it, and how it hangs on them."""
    without = number(hierarchy.fvu_without_latents, ".4f")
    rows = f"{hierarchy.n_rows:,} {hierarchy.shard_set.rows}"
    table = ResultTable(
        title=f"{run_and_step(hierarchy.transcoder)}, on {rows} of {hierarchy.shard_set.name}",
        caption=f"FVU without any latent {without}. adds: share of the variance. "
        "fires on: rows with any latent of the group. most on: tokens whose FVU it lowers most, by their share of the "
        f"train split. implied: latents with a parent (in the best earlier group) on at least {IMPLIED:.0%} of their "
        "rows. P: mean of the largest P(parent | latent). |cos|: of decoder rows inside the group",
    )
    for name in ("group", "prefix", "FVU", "adds", "fires on", "L0", "most on", "implied", "P", "|cos|"):
        table.add_column(
            name, drop=("most on", "P", "|cos|").index(name) + 1 if name in ("most on", "P", "|cos|") else 0
        )
    for group in hierarchy.groups:
        parents = [pair for pair in hierarchy.pairs if pair.child_group == group.group]
        (inside,) = (pair for pair in parents if pair.parent_group == group.group)
        earlier = [pair for pair in parents if pair.parent_group < group.group]
        best = max(earlier, key=lambda pair: pair.mean_best_parent or 0, default=None)
        table.add_row(
            f"{group.n_latents:,}",
            f"{group.prefix_end:,}",
            number(group.fvu_after, ".4f"),
            number(group.share_of_variance, ".4f"),
            f"{group.share_of_rows:.1%}",
            f"{group.l0:.1f}",
            _most(group, hierarchy.n_rows),
            "-" if best is None else number(best.share_implied, ".0%"),
            "-" if best is None else number(best.mean_best_parent, ".2f"),
            number(inside.mean_abs_cosine, ".3f"),
        )
    return table


def clusters_line(hierarchy: Hierarchy) -> str:
    """The clusters in a sentence."""
    clusters = hierarchy.clusters
    if clusters is None:
        return "decoder directions were not clustered"
    mixed = "" if clusters.share_mixed is None else f", {clusters.share_mixed:.0%} of them across groups"
    return (
        f"{clusters.n_clusters:,} clusters of decoder directions{mixed}; "
        f"{clusters.share_clustered:.0%} of {clusters.n_directions:,} latents are in one"
    )


def _most(group: GroupGain, n_rows: int) -> str:
    """The token frequency where the group lowers the FVU most, of those with a hundredth of the rows or more."""
    drops = {
        stratum.name: stratum.fvu_before - stratum.fvu_after
        for stratum in group.by_token_frequency
        if stratum.fvu_before is not None and stratum.fvu_after is not None and stratum.n_rows >= n_rows / 100
    }
    return max(drops, key=lambda name: drops[name], default="-")
