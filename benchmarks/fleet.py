"""Four runs from one stream, against their four steps alone on batches that are already in memory.

    python benchmarks/fleet.py [--shards data/demo/l15] [--steps 24] [--rounds 3]

Each round trains the fleet and then every member alone. Times are medians over steps, from the end of one to the end of
the next; the ratio is the median over rounds. On a machine that others use, run it with OMP_NUM_THREADS=1 and read the
ratio of the training thread's processor time, which leaves out the turns that others had; the data wait is beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka.shards import ShardSet
from train.config import TrainConfig
from train.fleet import members
from train.memory import member_need, stream_need
from train.plan import make_plan
from train.run import Silent, train, train_fleet
from train.step import StepReport
from train.stream import Batch, Stream

FLEET: list[dict[str, Any]] = [
    {"name": "base", "group_sizes": [288, 576, 1152, 2592]},
    {"name": "plain", "group_sizes": [4608]},
    {"name": "small-k", "group_sizes": [288, 576, 1152, 2592], "k": 16},
    {"name": "raw", "group_sizes": [512, 2048], "input": "resid_mid", "condition": "standardise"},
]


class Rounds(Silent):
    """Seconds from the end of one step of the last member to the end of its next."""

    def __init__(self, last: str) -> None:
        self.last = last
        self.ends: list[float] = []
        self.worked: list[float] = []

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:  # noqa: ARG002
        if name == self.last:
            self.ends.append(time.perf_counter())
            self.worked.append(time.thread_time())

    def median(self) -> tuple[float, float]:
        """Seconds, and seconds of this thread's processor time, without the first steps and the last: it calibrates."""
        return _median_step(self.ends), _median_step(self.worked)


def _median_step(ends: list[float]) -> float:
    return statistics.median([b - a for a, b in zip(ends, ends[1:], strict=False)][2:-1])


class PeakMemory:
    """The most anonymous memory that this process has had, sampled while it is open; pages of files do not count."""

    def __init__(self) -> None:
        self.before = anonymous_bytes()
        self.peak = self.before
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def estimate(config: TrainConfig, shards: ShardSet) -> int:
    """What train/memory.py reckons for the fleet."""
    widths = {"d_in": shards.d_in, "d_out": shards.d_out}
    needs = []
    for member in members(config):
        plan = make_plan(member.config, shards, 0)
        needs.append(member_need(member.config, plan, **widths, device=torch.device("cpu")))
    held = sum(need.held for need in needs)
    return held + max(n.step for n in needs) + max(n.snapshot for n in needs) + stream_need(config, **widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("data/demo/l15"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shards = ShardSet.open(options.shards)
    settings = {"shards": options.shards, "k": 32, "steps": options.steps, "batch_tokens": 2048, "lr": 3e-3}
    settings |= {"log_every": 2, "calibration_tokens": 2048, "device": "cpu", "fleet": FLEET}
    config = TrainConfig.model_validate(settings)
    stream = Stream(shards, batch_rows=2048, buffer_rows=config.buffer_tokens, seed=0)
    held = list(stream.batches(0, options.steps))
    from_disk = Stream.batches
    loads = {"rows": 0}

    def from_memory(self: Stream, start: int, stop: int) -> Iterator[Batch]:
        # The rows that latents start from have a seed of their own, and must be the same ones.
        yield from held[start:stop] if self._seed == config.order_seed else from_disk(self, start, stop)

    def counted(self: Stream, pieces: Sequence[Any]) -> Any:
        loads["rows"] += sum(piece.stop - piece.start for piece in pieces)
        return load(self, pieces)  # type: ignore[arg-type]

    load = Stream.load
    ratios, worked, waits, peaks = [], [], [], []
    print("| round | fleet, s a step | sum of the four alone | ratio | of processor time | data wait |")
    print("|---|---|---|---|---|---|")
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            progress = Rounds(FLEET[-1]["name"])
            Stream.load = counted  # type: ignore[method-assign,assignment]
            with PeakMemory() as memory:
                train_fleet(config.model_copy(update={"out": Path(folder) / "fleet"}), progress)
            Stream.load = load  # type: ignore[method-assign]
            lines = (Path(folder) / "fleet/base/timing.jsonl").read_text().splitlines()
            waits.append(statistics.mean(json.loads(line)["data_wait"] for line in lines[1:]))
            alone, alone_worked = 0.0, 0.0
            Stream.batches = from_memory  # type: ignore[method-assign]
            for entry in members(config):
                mine = Rounds(entry.name)
                train(entry.config.model_copy(update={"out": Path(folder) / entry.name}), mine)
                seconds = mine.median()
                alone, alone_worked = alone + seconds[0], alone_worked + seconds[1]
            Stream.batches = from_disk  # type: ignore[method-assign]
            together = progress.median()
            ratios.append(together[0] / alone)
            worked.append(together[1] / alone_worked)
            cells = f"{together[0]:.3f} | {alone:.3f} | {ratios[-1]:.3f} | {worked[-1]:.3f} | {100 * waits[-1]:.2f}%"
            print(f"| {number} | {cells} |", flush=True)
        peaks.append((memory.peak - memory.before) / 1e6)
    print(f"\nmedian over rounds: {statistics.median(ratios):.3f}; of processor time {statistics.median(worked):.3f}")
    reckoned, rows = estimate(config, shards) / 1e6, loads["rows"] // options.rounds
    print(f"memory above the start: {peaks[0]:.0f} MB at its peak; the estimate was {reckoned:.0f} MB")
    print(f"rows read for 4 runs of {options.steps} steps of 2048: {rows:,} (with those to start from and read-ahead)")


if __name__ == "__main__":
    main()
