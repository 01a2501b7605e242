"""The table of `evaluate layers`."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ..tables import number, over_documents
from .layers import Layers


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
        for index, prefix in enumerate(entry.prefixes):
            half = None if prefix.fvu_interval is None else (prefix.fvu_interval[1] - prefix.fvu_interval[0]) / 2
            table.add_row(
                *(facts if index == 0 else ("",) * len(facts)),
                f"{prefix.prefix_end:,}",
                number(prefix.fvu, ".4f"),
                number(half, ".4f"),
                f"{prefix.l0:.1f}",
                f"{prefix.cosine:.4f}",
                f"{prefix.dead_share:.1%}",
                number(prefix.ce_recovered, ".4f"),
                ends_section=index == len(entry.prefixes) - 1,
            )
    return table
