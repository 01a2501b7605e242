"""What a harvest says at its end: what is there now, and what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matryoshka.tables import ResultTable
from matryoshka.terminal import next_command, note, show

from .estimate import gigabytes
from .progress import describe_codec
from .sets import HarvestResult


def close(results: Sequence[HarvestResult], config: Path | None = None) -> None:
    """Say what a finished harvest leaves behind; `config` is the file that named its settings."""
    if len(results) == 1:
        _say(results[0])
    else:
        show(results_table(results))
        if not any(one.n_shards_written for one in results):
            note("nothing left to do")
    for one in results:
        if one.n_tokens < one.n_tokens_planned:
            note(f"{one.path}: the text ended early: {one.n_tokens:,} of {one.n_tokens_planned:,} tokens", warning=True)
        if one.skipped_lines:
            files = ", ".join(f"{count:,} of {file}" for file, count in one.skipped_lines.items())
            note(f"{one.path}: {sum(one.skipped_lines.values()):,} broken lines were left out ({files})", warning=True)
        if one.val_unit == "block":
            note(f"{one.path}: val is made of held-out blocks; train has other parts of the same documents")
    file = () if config is None else ("--config", config)
    if len(results) > 1:
        note(f"each of the {len(results)} sets is trained on by itself, for example the first:")
    next_command("train", "run", "--shards", results[0].path, *file)


def results_table(results: Sequence[HarvestResult]) -> ResultTable:
    """One line a shard set."""
    lossy = any(name.endswith("_error") for one in results for name in one.measured)
    table = ResultTable(
        caption="of bf16: size of the activations against raw bfloat16"
        + (". error: largest relative error of a site, outside attention sinks" if lossy else "")
    )
    table.add_column("shard set", left=True, stack="above")
    for name, drop in (("new shards", 3), ("tokens", 0), ("size", 0), ("bytes/token", 2), ("of bf16", 1)):
        table.add_column(name, drop=drop)
    if lossy:
        table.add_column("error")
    for one in results:
        errors = [value for name, value in one.measured.items() if name.endswith("_error")]
        table.add_row(
            str(one.path),
            f"{one.n_shards_written:,}",
            f"{one.n_tokens:,}",
            gigabytes(one.bytes_on_disk),
            f"{one.bytes_on_disk / one.n_tokens:,.0f}",
            f"{one.measured['compression_ratio']:.3f}",
            *([f"{max(errors):.2%}" if errors else "0%"] if lossy else []),
        )
    return table


def _say(one: HarvestResult) -> None:
    per_token = one.bytes_on_disk / one.n_tokens
    size = f"{one.n_tokens:,} tokens, {gigabytes(one.bytes_on_disk)}, {per_token:.0f} bytes per token"
    if one.n_shards_written == 0:
        note(f"{one.path}: nothing left to do ({size})")
    else:
        note(f"{one.path}: {one.n_shards_written} shards written ({size})")
        note(f"{one.path}: {describe_codec(one.measured)}")
