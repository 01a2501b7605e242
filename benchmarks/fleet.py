"""What a fleet costs beside its steps: time, memory, checkpoints.

    python -m benchmarks.fleet [--shards data/demo/l15] [--cycles 12] [--tables time memory checkpoints]

time         Four runs from one stream, against the same four alone on batches that are already in memory. All five are
             processes of their own that go on all the time but for being stopped: one runs at a time, for --window
             seconds, in turn. So a ratio compares moments that are seconds apart, and is the median over the cycles. On
             a machine that others use read the ratio of processor time (of all threads: the readers' is in it).
memory       The most that the fleet's process takes, against what train/memory.py estimates before the start; then the
             same fleet from a quarter of the set, the whole, and the set four times over.
checkpoints  How long a checkpoint holds up training: the time in which a member makes its snapshot, the wait for the
             writer included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.copied_sets import copy_set
from matryoshka.shards import ShardSet
from train.batches.stream import Batch, Stream
from train.config import TrainConfig
from train.fleet import members
from train.member import Member
from train.memory import estimated_bytes, member_estimate
from train.plan import make_plan
from train.progress import NoProgress
from train.run import train_fleet
from train.step.step import StepReport

BATCH = 2048
N_HELD = 24
"""Batches in memory for those that train alone; taken again and again."""
FLEET: list[dict[str, Any]] = [
    {"name": "base", "group_sizes": [288, 576, 1152, 2592]},
    {"name": "plain", "group_sizes": [4608]},
    {"name": "small-k", "group_sizes": [288, 576, 1152, 2592], "k": 16},
    {"name": "raw", "group_sizes": [512, 2048], "input": "resid_mid", "condition": "standardise"},
]


def settings(shards: Path, out: Path, names: Sequence[str], **changes: Any) -> TrainConfig:
    """The fleet of those members. No latent ever counts as dead, as their number would differ from run to run."""
    values = {"shards": shards, "out": out, "k": 32, "batch_tokens": BATCH, "lr": 1e-3, "device": "cpu"}
    values |= {"steps": 1_000_000, "dead_after_tokens": 10**12, "calibration_tokens": BATCH}
    values |= {"checkpoint_every": 1_000_000, "fleet": [entry for entry in FLEET if entry["name"] in names]}
    return TrainConfig.model_validate(values | changes)


class Ends(NoProgress):
    """Writes a line at the end of each step of the last member: seconds, and the process's processor seconds."""

    def __init__(self, last: str, file: Path, stop_after: int | None = None) -> None:
        self.last, self.stop_after = last, stop_after
        self._file = file.open("w", encoding="utf-8")

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:  # noqa: ARG002
        if name == self.last:
            self._file.write(f"{time.monotonic()} {time.process_time()}\n")
            self._file.flush()
            if step == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)


def run_child(options: argparse.Namespace) -> None:
    """Train until killed, or for --steps: --child is the name of a member, or `fleet`."""
    folder: Path = options.folder
    names = [entry["name"] for entry in FLEET] if options.child == "fleet" else [options.child]
    changes = {"checkpoint_every": options.checkpoint_every} if options.checkpoint_every else {}
    config = settings(options.shards, folder / "runs", names, buffer_tokens=options.buffer, **changes)
    if options.child != "fleet":
        shards = ShardSet.open(options.shards)
        held = list(Stream(shards, batch_rows=BATCH, buffer_rows=options.buffer, seed=0).batches(0, N_HELD))
        from_disk = Stream.batches

        def from_memory(self: Stream, start: int, stop: int) -> Iterator[Batch]:
            # The rows that latents start from have a seed of their own, and must be the same ones.
            if self._seed != config.order_seed:
                return from_disk(self, start, stop)
            return (held[step % N_HELD] for step in range(start, stop))

        Stream.batches = from_memory  # type: ignore[method-assign]
    stalls: list[float] = []
    save = Member._save

    def timed_save(self: Member, calibrated: float | None) -> None:
        start = time.perf_counter()
        save(self, calibrated)
        stalls.append(time.perf_counter() - start)

    Member._save = timed_save  # type: ignore[method-assign]
    with PeakMemory() as memory:
        train_fleet(config, Ends(names[-1], folder / "ends.txt", options.steps or None))
    found = {"stalls": stalls[: -len(names)], "peak": memory.peak - memory.before, "before": memory.before}
    found["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


class PeakMemory:
    """The most anonymous memory that this process has had, sampled while it is open; pages of files do not count."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_bytes()
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


def child(name: str, folder: Path, shards: Path, *flags: object) -> subprocess.Popen[bytes]:
    """A process of this script that trains in `folder`."""
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.fleet",
        "--child",
        name,
        "--folder",
        folder,
        "--shards",
        shards,
        *flags,
    ]
    return subprocess.Popen(list(map(str, command)), cwd=Path(__file__).resolve().parents[1])


def ends_of(folder: Path) -> list[tuple[float, float]]:
    file = folder / "ends.txt"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [(float(a), float(b)) for a, b in (line.split() for line in lines if line.endswith("\n"))]


def time_table(options: argparse.Namespace, folder: Path) -> None:
    """Fleet against alone, in turns."""
    names = ["fleet", *(entry["name"] for entry in FLEET)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    windows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    try:
        for name in names:
            running[name] = child(name, folder / name, options.shards)
            while len(ends_of(folder / name)) < 3:
                if running[name].poll() is not None:
                    raise SystemExit(f"{name} ended before its third step")
                time.sleep(0.1)
            running[name].send_signal(signal.SIGSTOP)
        for _ in range(options.cycles):
            for name in names:
                start = time.monotonic()
                running[name].send_signal(signal.SIGCONT)
                # The fleet's step is as long as those of the others together.
                time.sleep(options.window * (len(FLEET) if name == "fleet" else 1))
                running[name].send_signal(signal.SIGSTOP)
                windows[name].append((start, time.monotonic()))
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    ends = {name: ends_of(folder / name) for name in names}
    steps = {name: [_steps(ends[name], *window) for window in windows[name]] for name in names}
    ratios, worked, rows = [], [], []
    for number in range(options.cycles):
        found = {name: steps[name][number] for name in names}
        if not all(found.values()):
            continue
        medians = {
            name: [statistics.median(values) for values in zip(*one, strict=True)] for name, one in found.items()
        }
        alone = [sum(medians[name][kind] for name in names[1:]) for kind in (0, 1)]
        ratios.append(medians["fleet"][0] / alone[0])
        worked.append(medians["fleet"][1] / alone[1])
        rows.append((medians["fleet"][0], alone[0]))
    if not ratios:
        raise SystemExit("no window held a whole step of each; use a longer --window")
    print("\n### Four runs from one stream, against their four steps alone without data\n")
    print("| | fleet / sum of the four alone | quartiles over cycles |\n|---|---|---|")
    for name, values in (("seconds", ratios), ("processor seconds, all threads", worked)):
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    fleet, alone_ = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"\n{len(ratios)} cycles; the fleet's step {fleet:.3f} s, the four alone {alone_:.3f} s", flush=True)


def _steps(ends: Sequence[tuple[float, float]], start: float, stop: float) -> list[tuple[float, float]]:
    """Seconds and processor seconds of the steps that are in a window. The first after its start was under way."""
    inside = [end for end in ends if start < end[0] < stop]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(inside, inside[1:], strict=False)]


def estimate(config: TrainConfig, shards: ShardSet) -> int:
    """What train/memory.py estimates for the fleet."""
    widths = {"d_in": shards.d_in, "d_out": shards.d_out}
    estimates = []
    for member in members(config):
        plan = make_plan(member.config, shards, 0)
        estimates.append(member_estimate(member.config, plan, **widths, device=torch.device("cpu")))
    stream = Stream(shards, batch_rows=BATCH, buffer_rows=config.buffer_tokens, seed=0)
    return estimated_bytes(estimates, stream.n_bytes)


def finished(folder: Path, shards: Path, *flags: object) -> dict[str, Any]:
    """What a child that ended by itself has found."""
    if child("fleet", folder, shards, *flags).wait() != 0:
        raise SystemExit("the benchmark's own training failed")
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def memory_table(options: argparse.Namespace, folder: Path) -> None:
    """Peak memory over sizes of the set; the buffer is smaller than the smallest."""
    shards = ShardSet.open(options.shards)
    buffer = 16_384
    config = settings(options.shards, folder / "none", [e["name"] for e in FLEET], buffer_tokens=buffer)
    print("\n### Memory of the fleet, one checkpoint of each run included, buffer 16,384 rows\n")
    print("| train rows | MB on disk | MB above the start, at the peak | of the whole set's | peak resident, MB |")
    print("|---|---|---|---|---|", flush=True)
    sets = {0.25: None, 1: options.shards, 4: None}
    peaks: dict[float, float] = {}
    for times in (1, 0.25, 4):
        path = sets[times] or folder / f"set-{times}"
        one = shards if sets[times] else copy_set(shards, path, times=times)
        n_rows = sum(int(one.train.keep(number).sum()) for number in range(one.train.n_shards))
        found = finished(folder / f"run-{times}", path, "--steps", 40, "--checkpoint-every", 15, "--buffer", buffer)
        peaks[times] = found["peak"] / 1e6
        numbers = f"{peaks[times]:.0f} | {peaks[times] / peaks[1]:.3f} | {found['resident'] / 1e6:.0f}"
        print(f"| {n_rows:,} | {one.bytes_on_disk() / 1e6:.0f} | {numbers} |", flush=True)
    print(f"\nestimated before the start: {estimate(config, shards) / 1e6:.0f} MB")


def checkpoint_table(options: argparse.Namespace, folder: Path) -> None:
    """Stalls of the training thread."""
    found = finished(folder / "saving", options.shards, "--steps", 45, "--checkpoint-every", 10)
    ends = ends_of(folder / "saving")
    step = statistics.median(b[0] - a[0] for a, b in zip(ends[2:], ends[3:], strict=False)) / len(FLEET)
    stalls = [1000 * value for value in found["stalls"]]
    print("\n### What a checkpoint holds up\n")
    print(f"{len(stalls)} checkpoints of {len(FLEET)} runs in the same steps: {statistics.mean(stalls):.0f} ms each,")
    print(f"{statistics.median(stalls):.0f} ms in the median, {max(stalls):.0f} ms at most; a step takes", end=" ")
    share = statistics.mean(stalls) / (1000 * step)
    print(f"{1000 * step:.0f} ms. One checkpoint in 100 steps: {share:.2f}% of the time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("data/demo/l15"))
    parser.add_argument("--cycles", type=int, default=12)
    parser.add_argument("--window", type=float, default=1.5, help="seconds of one run; the fleet has four times that")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    for name, kind in (("child", str), ("folder", Path), ("steps", int), ("checkpoint-every", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--buffer", type=int, default=131_072, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shards = options.shards.resolve()
    if options.child:
        run_child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in options.tables:
            TABLES[name](options, Path(folder) / name)


TABLES = {"time": time_table, "memory": memory_table, "checkpoints": checkpoint_table}


if __name__ == "__main__":
    main()
