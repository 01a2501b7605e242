"""How fast rows come, against the codec's own rate and against what the trainer takes.

    python -m benchmarks.stream [--shards data/demo/l15] [--config examples/demo.yaml]

Rates of reading are the best of several rounds in turn, on one thread, from the page cache, by the processor time of
the process (of its system calls too), which leaves out the turns that other programs had.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] -- a compiled module

from benchmarks.copied_sets import copy_set
from matryoshka.config import load_config
from matryoshka.runs import read_json
from matryoshka.shards import ShardSet
from matryoshka.shards.direct import open_files
from train.batches.stream import Stream
from train.config import TrainConfig
from train.run import train


def best(rounds: int, contestants: dict[str, Callable[[], int]]) -> dict[str, float]:
    """GB a second of processor time: bytes given over the fastest round; one round runs each once."""
    rates = dict.fromkeys(contestants, 0.0)
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.process_time()
            n_bytes = run()
            rates[name] = max(rates[name], n_bytes / (time.process_time() - start) / 1e9)
    return rates


def read_rates(shards: ShardSet, rounds: int) -> dict[str, float]:
    """All chunks of the train split in shuffled order: the limit, the shard files, Zarr's pipeline."""
    split, root = shards.train, cast(Any, shards.root)
    arrays = {side: root[f"train/{side}"] for side in ("source", "target")}
    files = {side: open_files(shards.path, array, f"train/{side}") for side, array in arrays.items()}
    step = split.chunk_positions
    order = [(i, p, side) for i in range(split.n_shards) for p in range(0, shards.ctx_len, step) for side in arrays]
    random.Random(0).shuffle(order)
    scratch = np.empty((step, *arrays["source"].shape[2:]), arrays["source"].dtype)
    encoded = []
    for shard, position, side in order:
        found = files[side]
        assert found is not None
        offset, length = (int(value) for value in found._index(shard)[position // step])
        with (Path(shards.path) / found._key(shard)).open("rb") as file:
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
            # As the stream reads, which copies the rows at once. Without `reuse`, of raw chunks come maps.
            values = found.read(shard, position, position + step, reuse=True)
            assert values is not None
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
        sets = {shards.manifest.codec: shards, "raw": copy_set(shards, Path(folder) / "raw", codec="raw")}
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


def _parse(line: str) -> dict[str, float]:
    import json

    return json.loads(line)


if __name__ == "__main__":
    main()
