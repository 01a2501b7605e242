"""What measuring costs beside reading the rows and the bare encoder product, and what memory it takes.

    python -m benchmarks.evaluate data/demo/runs/l15-k32 data/demo/l15

(From the root of the checkout; as a script, its own name would hide the package it measures.)

Targets: the pass of `evaluate run` at most 1.5 x, that of `evaluate samples` at most 2 x (reading + encoder GEMM) over
the same rows, and memory that does not depend on the number of rows. One thread; in each round the floor and the pass
take turns batch by batch, so that a machine that is busy for a while slows both; a ratio is that of the sums of a
round, once of CPU time of the process and once of wall time. The GEMM writes into a buffer that exists already.

The pass is whole: both modes, breakdown, latents, and the L0-FVU curve from evaluate.curve_tokens rows.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from evaluate.analyses.reconstruction.row_pass import Measurement
from evaluate.analyses.samples.sampling import Choice, Sampling
from evaluate.config import EvaluateConfig
from evaluate.rows.batches import count_rows, input_and_target, row_batches
from evaluate.rows.context_blocks import context_blocks, count_contexts
from evaluate.rows.windows import WindowShape
from matryoshka.checkpoints import find_checkpoint
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Clock:
    """CPU and wall seconds of one side of a comparison."""

    cpu: float = 0.0
    wall: float = 0.0
    _since: tuple[float, float] = field(default=(0.0, 0.0))

    def __enter__(self) -> Clock:
        self._since = (time.process_time(), time.perf_counter())
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += time.process_time() - self._since[0]
        self.wall += time.perf_counter() - self._since[1]


def timed(items: Iterable[T], clock: Clock) -> Iterator[T]:
    """`items`, with the time it takes to get each on `clock`."""
    iterator = iter(items)
    while True:
        with clock:
            item = next(iterator, None)
        if item is None:
            return
        yield item


class Gemm:
    """The bare encoder product of a batch, a tile of rows at a time, into one buffer."""

    def __init__(self, transcoder: Transcoder, rows: int = 1024) -> None:
        self._transcoder, self._buffer = transcoder, torch.empty(rows, transcoder.config.d_sae)

    def __call__(self, x: Tensor) -> None:
        for part in x.split(len(self._buffer)):
            torch.addmm(self._transcoder.b_enc, part, self._transcoder.W_enc, out=self._buffer[: len(part)])


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    transcoder: Transcoder
    shards: ShardSet
    config: EvaluateConfig

    def reconstruction(self, gemm: Gemm | None) -> tuple[int, Clock, Clock, Clock]:
        """(rows, reading, GEMM, pass without reading) of one pass."""
        read, floor, work = Clock(), Clock(), Clock()
        sums = Measurement(self.transcoder, self.shards, self.config)
        split = self.shards.split(self.config.split)
        for batch in timed(row_batches(split, self.config.batch_rows, self.config.tokens), read):
            if gemm is not None:
                with floor:
                    gemm(input_and_target(self.transcoder, self.shards, batch)[0])
            with work:
                sums.add(batch)
        return sums.n_rows, read, floor, work

    def samples(self, gemm: Gemm | None) -> tuple[int, Clock, Clock, Clock]:
        """The same of the pass that chooses windows."""
        read, floor, work = Clock(), Clock(), Clock()
        split, settings = self.shards.split(self.config.split), self.config.samples
        shape = WindowShape(settings.before, settings.after)
        choice = Choice(settings.top, 20 * settings.per_decile, shape, seed=0)
        sampling = Sampling(self.transcoder, self.shards, split, choice)
        n_contexts, _ = count_contexts(split, self.config.tokens)
        for block in timed(context_blocks(self.shards, split, shape, n_contexts), read):
            if gemm is not None:
                with floor:
                    site, norm = self.shards.manifest.source.site, self.shards.norm
                    kept = block.source[block.keep]
                    gemm(apply_convention(kept, self.transcoder.config.input, source_site=site, norm=norm))
            with work:
                sampling.add(block)
        return sampling.n_rows, read, floor, work


def rounds_of(name: str, run: Callable[[Gemm], tuple[int, Clock, Clock, Clock]], gemm: Gemm, n: int) -> None:
    ratios: dict[str, list[float]] = {"cpu": [], "wall": []}
    for place in range(n + 1):
        rows, read, floor, work = run(gemm)
        if place == 0:  # the first round warms up
            continue
        for kind, values in ratios.items():
            r, f, w = (getattr(clock, kind) for clock in (read, floor, work))
            values.append((r + w) / (r + f))
        print(
            f"| {name} | {place} | {rows:,} | {read.cpu:.2f} | {floor.cpu:.2f} | {work.cpu:.2f} "
            f"| {ratios['cpu'][-1]:.2f} | {ratios['wall'][-1]:.2f} |",
            flush=True,
        )
    medians = [statistics.median(values) for values in ratios.values()]
    print(f"| {name} | **median** | | | | | **{medians[0]:.2f}** | **{medians[1]:.2f}** |", flush=True)


def memory(words: argparse.Namespace, n_rows: int) -> None:
    """Peak memory of passes over parts of the rows, each in a process of its own."""
    print("\n| pass | rows | peak memory, MB |\n| --- | --- | --- |")
    for what in ("reconstruction", "samples"):
        for share in (8, 4, 2, 1):
            tokens = str(n_rows // share)
            command = [
                sys.executable,
                "-m",
                "benchmarks.evaluate",
                str(words.run.resolve()),
                str(words.shards.resolve()),
                "--split",
                words.split,
            ]
            command += ["--tokens", tokens, "--peak-of", what]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            print(f"| {what} | {int(tokens):,} | {int(done.stdout):,} |", flush=True)


def peak_kib() -> int:
    """Most memory that this process has held; ru_maxrss would start from what its parent had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--split", default="val", help="train has more rows; nothing is published")
    parser.add_argument("--tokens", type=int, default=None, help="rows to measure on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-of", choices=("reconstruction", "samples"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    torch.set_num_threads(1)
    shards, transcoder = ShardSet.open(words.shards), Transcoder.load(find_checkpoint(words.run).folder)
    config = EvaluateConfig(shards=words.shards, split=words.split, tokens=words.tokens, device="cpu")
    bench = Bench(transcoder, shards, config)
    if words.peak_of:
        getattr(bench, words.peak_of)(None)
        print(peak_kib() // 1024)
        return
    shape = transcoder.config
    print(f"d_in {shape.d_in}, d_out {shape.d_out}, d_sae {shape.d_sae}, {len(shape.group_sizes)} groups, one thread\n")
    print("| pass | round | rows | reading, CPU s | GEMM, CPU s | rest of the pass, CPU s | CPU ratio | wall ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    gemm = Gemm(transcoder)
    rounds_of("reconstruction", bench.reconstruction, gemm, words.rounds)
    rounds_of("samples", bench.samples, gemm, words.rounds)
    if not words.no_memory:
        memory(words, count_rows(shards, words.split, words.tokens))


if __name__ == "__main__":
    main()
