"""How well the stream mixes documents: other rows of a row's own document in its batch, counted.

    python -m benchmarks.shuffle --model data/demo/inputs/model --text data/demo/inputs/text --out data/shuffle/l3
    python -m benchmarks.shuffle --shards data/l17

Neighbouring tokens of one document are alike, so a batch that holds many of them is worth less than its size. With
--text each paragraph of the files becomes a document, as short as web pages are, and is harvested by `harvest run` from
an early block; run again, it goes on or counts what is there. Counted are all rows of whole batches as training takes
them. "At random" is what a permutation of all rows would give, computed exactly: no stream is better on average.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from matryoshka.shards import ShardSet
from train.batches.stream import Stream

ROOT = Path(__file__).resolve().parents[1]
MIN_CHARACTERS = 20
"""A shorter paragraph is a heading or a page number."""


class DocumentIds:
    """A set as the stream sees it, whose activations are the number of each row's document."""

    def __init__(self, ids: list[Tensor], keep: list[Tensor], chunk_positions: int) -> None:
        """`ids`, `keep`: of each shard, [ctx_len, n_contexts]."""
        self._ids, self._keep = ids, keep
        self.path = Path("documents")
        self.d_in, self.d_out = 2, 2  # the 32 bits of a number as two bfloat16
        self.train = SimpleNamespace(
            n_shards=len(ids), chunk_positions=chunk_positions, keep=keep.__getitem__, activations=self._activations
        )

    def _activations(self, _side: str, shard: int, start: int, stop: int, *, reuse: bool) -> Tensor:  # noqa: ARG002
        return self._ids[shard][start:stop].int().contiguous().unsqueeze(2).view(torch.bfloat16)

    def rows(self) -> Tensor:
        """The document of every trained row, in the order of the disk."""
        return torch.cat([ids[keep] for ids, keep in zip(self._ids, self._keep, strict=True)])


def harvested(shards: ShardSet) -> DocumentIds:
    """The train split of a real set."""
    split = shards.train
    return DocumentIds(
        [split.doc_ids(shard).T for shard in range(split.n_shards)],
        [split.keep(shard) for shard in range(split.n_shards)],
        split.chunk_positions,
    )


def planned(n_tokens: int, ctx_len: int, contexts: int, chunk_positions: int) -> DocumentIds:
    """The layout of a large set in which every context is a document of its own."""
    n_shards = n_tokens // (ctx_len * contexts)
    keep = torch.ones(ctx_len, contexts, dtype=torch.bool)
    keep[0] = False
    ids = [(torch.arange(contexts) + shard * contexts).expand(ctx_len, contexts) for shard in range(n_shards)]
    return DocumentIds(ids, [keep] * n_shards, chunk_positions)


def company(documents: DocumentIds, batch_rows: int, buffer_rows: int, n_batches: int) -> list[float]:
    """Of each batch, the mean number of other rows of a row's own document in it; at most an epoch is counted."""
    stream = Stream(cast(Any, documents), batch_rows=batch_rows, buffer_rows=buffer_rows, seed=0)
    found = []
    for batch in stream.batches(0, min(n_batches, stream.n_rows // batch_rows)):
        counts = torch.unique(batch.source.contiguous().view(torch.int32), return_counts=True)[1].double()
        found.append(float((counts * (counts - 1)).sum()) / batch_rows)
    return found


def at_random(documents: DocumentIds, batch_rows: int) -> float:
    """The same number for a batch drawn without any regard to where rows are."""
    counts = torch.unique(documents.rows(), return_counts=True)[1].double()
    n = counts.sum()
    return float((counts * (counts - 1)).sum() / n * (batch_rows - 1) / (n - 1))


def paragraphs(folder: Path) -> list[str]:
    """The paragraphs of all text files below `folder`, in the order of their names."""
    found = []
    for path in sorted(folder.rglob("*.txt")):
        parts = re.split(r"\n+", path.read_text(encoding="utf-8", errors="replace"))
        found += [part.strip() for part in parts if len(part.strip()) >= MIN_CHARACTERS]
    if not found:
        raise SystemExit(f"{folder} holds no paragraphs in .txt files; `make demo` downloads some")
    return found


def harvest(options: argparse.Namespace) -> None:
    """Write the paragraphs beside the set as a jsonl file, one document a line, and harvest them."""
    documents = options.out.with_name(options.out.name + "-paragraphs.jsonl")
    documents.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in paragraphs(options.text)]
    documents.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "harvest", "run", "--model", options.model, "--dataset", documents.resolve()]
    command += ["--layer", options.layer, "--tokens", options.tokens, "--ctx-len", options.ctx_len]
    command += ["--batch-size", 16, "--out", options.out.resolve()]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="count this set; nothing is harvested")
    parser.add_argument("--model", type=Path, default=Path("data/demo/inputs/model"))
    parser.add_argument("--text", type=Path, default=Path("data/demo/inputs/text"))
    parser.add_argument("--out", type=Path, default=Path("data/shuffle/l3"))
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--ctx-len", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--buffer-rows", type=int, default=131_072)
    parser.add_argument("--batches", type=int, default=10_000, help="at most; an epoch is counted when it is shorter")
    options = parser.parse_args()
    if options.shards is None:
        options.model = options.model.resolve()
        harvest(options)
    shards = ShardSet.open(options.shards or options.out)
    real = harvested(shards)
    lengths = torch.unique(real.rows(), return_counts=True)[1].double()
    print(
        f"\n{shards.name}: {int(lengths.sum()):,} train rows of {len(lengths):,} documents, {lengths.mean():.0f} rows"
    )
    print(
        f"in a document on average ({float(lengths.square().sum() / lengths.sum()):.0f} in that of a row), in ", end=""
    )
    print(f"{shards.train.n_shards} shards of {shards.train.shard_contexts[0]} contexts of {shards.ctx_len}")
    print(f"\nOther rows of a row's own document in its batch of {options.batch_rows:,}, ", end="")
    print(f"buffer {options.buffer_rows:,} rows\n\n| set | batches | stream, mean | worst batch | at random |")
    print("|---|---|---|---|---|")
    for name, documents, n_batches in (
        (f"{shards.name}, as harvested", real, options.batches),
        ("layout of 15M tokens, contexts of 1024, each a document", planned(15_000_000, 1024, 64, 8), 30),
    ):
        found = company(documents, options.batch_rows, options.buffer_rows, n_batches)
        numbers = f"{sum(found) / len(found):.2f} | {max(found):.2f} | {at_random(documents, options.batch_rows):.2f}"
        print(f"| {name} | {len(found)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
