"""How fast rows come, against the codec's own rate and against what the trainer takes; and how well they are mixed.

    python benchmarks/stream.py [--shards data/demo/l15] [--config examples/demo.yaml]

Rates are the best of several rounds in turn, on one thread, from the page cache; a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] -- a compiled module
from torch import Tensor

from matryoshka.config import load_config
from matryoshka.runs import read_json
from matryoshka.shards import Manifest, ShardSet, ShardSetWriter
from matryoshka.shards.direct import open_files
from train.config import TrainConfig
from train.run import train
from train.stream import Stream


def copy_raw(shards: ShardSet, folder: Path) -> ShardSet:
    """The same set with the raw codec."""
    settings = shards.manifest.model_dump() | {"codec": "raw", "complete": False}
    writer = ShardSetWriter.open(folder, Manifest.model_validate(settings), shards.norm)
    for split in (shards.train, shards.val):
        for shard in range(split.n_shards):
            sides = [split.activations(side, shard) for side in ("source", "target")]
            writer.write_shard(split.name, shard, split.tokens(shard), split.doc_ids(shard), sides[0], sides[1])
    writer.finish()
    return ShardSet.open(folder)


def best(rounds: int, contestants: dict[str, Callable[[], int]]) -> dict[str, float]:
    """GB/s of each: bytes it says it has given, over its fastest round; one round runs each once."""
    rates = dict.fromkeys(contestants, 0.0)
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            n_bytes = run()
            rates[name] = max(rates[name], n_bytes / (time.perf_counter() - start) / 1e9)
    return rates


def read_rates(shards: ShardSet, rounds: int) -> dict[str, float]:
    """All chunks of the train split in shuffled order: the limit, the shard files, Zarr's pipeline."""
    split, root = shards.train, cast(Any, shards.root)
    arrays = {side: root[f"train/{side}"] for side in ("source", "target")}
    files = {side: open_files(shards.path / "train" / side, array) for side, array in arrays.items()}
    step = split.chunk_positions
    order = [(i, p, side) for i in range(split.n_shards) for p in range(0, shards.ctx_len, step) for side in arrays]
    random.Random(0).shuffle(order)
    scratch = np.empty((step, *arrays["source"].shape[2:]), arrays["source"].dtype)
    encoded = []
    for shard, position, side in order:
        found = files[side]
        assert found is not None
        offset, length = (int(value) for value in found._index(shard)[position // step])
        with found._path(shard).open("rb") as file:
            file.seek(offset)
            encoded.append(file.read(length))

    def limit() -> int:
        for content in encoded:
            if shards.manifest.codec == "raw":
                np.copyto(scratch.reshape(-1).view(np.uint8)[: len(content)], np.frombuffer(content, np.uint8))
            else:
                blosc.decompress(content, scratch)
        return scratch.nbytes * len(encoded)

    def direct() -> int:
        total = 0
        for shard, position, side in order:
            found = files[side]
            assert found is not None
            values = found.read(shard, position, position + step)
            assert values is not None
            # A map of raw bytes costs nothing until it is read, so it is.
            np.copyto(scratch, values) if shards.manifest.codec == "raw" else None
            total += values.nbytes
        return total

    def through_zarr() -> int:
        return sum(arrays[side][shard, position : position + step].nbytes for shard, position, side in order)

    return best(rounds, {"limit": limit, "direct": direct, "zarr": through_zarr})


def stream_rate(shards: ShardSet, config: TrainConfig, n_batches: int) -> float:
    """Rows a second of the stream with nobody behind it."""
    stream = Stream(shards, batch_rows=config.batch_tokens, buffer_rows=config.buffer_tokens, seed=0)
    batches = stream.batches(0, n_batches + 20)
    for _ in range(20):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return n_batches * config.batch_tokens / (time.perf_counter() - start)


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

    def _activations(self, _side: str, shard: int, start: int, stop: int) -> Tensor:
        return self._ids[shard][start:stop].int().contiguous().unsqueeze(2).view(torch.bfloat16)


def company(documents: DocumentIds, batch_rows: int, buffer_rows: int, n_batches: int = 30) -> float:
    """Mean number of other rows of a row's own document in its batch."""
    stream = Stream(cast(Any, documents), batch_rows=batch_rows, buffer_rows=buffer_rows, seed=0)
    n_batches = min(n_batches, stream.n_rows // batch_rows)
    total = 0.0
    for batch in stream.batches(0, n_batches):
        counts = torch.unique(batch.source.contiguous().view(torch.int32), return_counts=True)[1].double()
        total += float((counts * (counts - 1)).sum()) / batch_rows
    return total / n_batches


def at_random(documents: DocumentIds, batch_rows: int) -> float:
    """The same number for a batch drawn without any regard to where rows lie."""
    ids = torch.cat([i[k] for i, k in zip(documents._ids, documents._keep, strict=True)])
    counts = torch.unique(ids, return_counts=True)[1].double()
    n = counts.sum()
    return float((counts * (counts - 1)).sum() / n * (batch_rows - 1) / (n - 1))


def planned(n_tokens: int, ctx_len: int, contexts: int, chunk_positions: int) -> DocumentIds:
    """The layout of a large set in which every context is a document of its own."""
    n_shards = n_tokens // (ctx_len * contexts)
    keep = torch.ones(ctx_len, contexts, dtype=torch.bool)
    keep[0] = False
    ids = [(torch.arange(contexts) + shard * contexts).expand(ctx_len, contexts) for shard in range(n_shards)]
    return DocumentIds(ids, [keep] * n_shards, chunk_positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("data/demo/l15"))
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of the trainer")
    options = parser.parse_args()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blosc.use_threads = False
    shards = ShardSet.open(options.shards)
    config = load_config(TrainConfig, "train", file=options.config)

    with tempfile.TemporaryDirectory() as folder:
        print(f"\n### Reading {shards.name} chunk by chunk, shuffled, one thread (GB/s of activations)\n")
        print("| codec | limit: decode or memcpy | shard files | of limit | Zarr's pipeline | of limit |")
        print("|---|---|---|---|---|---|")
        sets = {shards.manifest.codec: shards, "raw": copy_raw(shards, Path(folder) / "raw")}
        for codec, each in sets.items():
            rates = read_rates(each, options.rounds)
            direct, zarr = rates["direct"], rates["zarr"]
            limit = rates["limit"]
            print(f"| {codec} | {limit:.2f} | {direct:.2f} | {direct / limit:.2f} | {zarr:.2f} | {zarr / limit:.2f} |")

        print("\n### The stream alone, and the trainer it feeds (rows/s)\n")
        alone = {codec: max(stream_rate(each, config, 150) for _ in range(2)) for codec, each in sets.items()}
        torch.set_num_threads(n_threads)
        run = Path(folder) / "run"
        train(config.model_copy(update={"shards": options.shards, "out": run, "steps": options.steps, "log_every": 10}))
        lines = [
            dict(zip(("rate", "wait"), (line["tokens_per_second"], line["data_wait"]), strict=True))
            for line in map(_parse, (run / "timing.jsonl").read_text().splitlines()[1:])
        ]
        read_json(run / "run.json", what="run")
        rate = sum(line["rate"] for line in lines) / len(lines)
        wait = sum(line["wait"] for line in lines) / len(lines)
        for codec, rows in alone.items():
            print(f"stream alone, {codec}: {rows:,.0f}; {rows / rate:.1f} x what the trainer takes ({rate:,.0f})")
        print(f"the trainer waits for data {100 * wait:.2f}% of its time (codec {shards.manifest.codec})")

    print("\n### Other rows of a row's own document in its batch of 4096, buffer 131,072 rows\n")
    split = shards.train
    real = DocumentIds(
        [split.doc_ids(shard).T for shard in range(split.n_shards)],
        [split.keep(shard) for shard in range(split.n_shards)],
        split.chunk_positions,
    )
    print("| rows | stream | drawn at random |\n|---|---|---|")
    sets_of_ids = {
        f"{shards.name}, as harvested": real,
        "15M tokens, contexts of 1024, each a document": planned(15_000_000, 1024, 64, 8),
    }
    for name, documents in sets_of_ids.items():
        print(f"| {name} | {company(documents, 4096, 131_072):.2f} | {at_random(documents, 4096):.2f} |")


def _parse(line: str) -> dict[str, float]:
    import json

    return json.loads(line)


if __name__ == "__main__":
    main()
