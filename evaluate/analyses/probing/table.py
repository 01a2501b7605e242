"""The table of `evaluate probing`."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ...tables import run_and_step
from .result import ProbingResult


def probing_table(result: ProbingResult) -> ResultTable:
    """Mean test accuracy of each label set: a line for each nested prefix, then one for its input."""
    shards = result.shard_set
    table = ResultTable(
        title=f"{run_and_step(result.transcoder)}: sparse probing on {shards.name} ({shards.split})",
        caption="mean test accuracy over the classes, chance 0.5. k: latents (of the input: dimensions) that differ "
        "most. all: a probe on the whole input",
    )
    ks: list[int] = result.settings["ks"]
    for name in ("labels", "classes"):
        table.add_column(name, left=name == "labels", stack="above")
    table.add_column("prefix")
    # Where many k were asked for, the first and the last say most.
    for index, k in enumerate(ks):
        table.add_column(f"k={k}", drop=index if index < len(ks) - 1 else 0)
    table.add_column("all")
    for label_set in result.sets:
        first = [label_set.name, str(len(label_set.classes))]
        for prefix in label_set.prefixes:
            table.add_row(*first, f"{prefix.prefix_end:,}", *(f"{score.accuracy:.3f}" for score in prefix.scores), "")
            first = ["", ""]
        source = (f"{score.accuracy:.3f}" for score in label_set.source_top_k)
        table.add_row(*first, "input", *source, f"{label_set.source.accuracy:.3f}", ends_section=True)
    return table
