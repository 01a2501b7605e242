"""What one training step costs, against its own floor and against the ways it is usually written.

    python -m benchmarks.train_step            everything (about half an hour on two cores)
    python -m benchmarks.train_step --quick    the main table only, fewer rounds

Every table interleaves its contestants: one round times each of them once, in turn. A ratio is the median over rounds
of (contestant / floor) WITHIN a round, so that a machine that is busy for a while slows both sides of it. The floor is
the bare fp32 encoder GEMM into a buffer that exists already, plus fused Adam over W_enc and W_dec.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.step_contestants import (
    Shape,
    Step,
    make_autograd,
    make_data,
    make_floor,
    make_gemm,
    make_ours,
    make_saelens,
)
from train.step.step import StepState


def timed(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each step per round; one round runs every step once, so that all share the machine's moods."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def ms(values: list[float]) -> list[str]:
    return [f"{statistics.median(values) * 1e3:.0f}", f"{min(values) * 1e3:.0f}"]


def main_table(shape: Shape, rounds: int) -> None:
    data = make_data(shape)
    makers: dict[str, Callable[[], Step | None]] = {
        "floor": lambda: make_floor(shape, data),
        "bare encoder GEMM, fp32": lambda: make_gemm(shape, data, torch.float32),
        "bare encoder GEMM, bf16": lambda: make_gemm(shape, data, torch.bfloat16),
        "ours, sparse, fp32": lambda: make_ours(shape, data, backend="sparse", precision="fp32"),
        "ours, sparse, bf16 encoder": lambda: make_ours(shape, data, backend="sparse", precision="bf16"),
        "ours, dense, fp32": lambda: make_ours(shape, data, backend="dense", precision="fp32"),
        "ours, sparse, fp32, half of the latents dead": lambda: make_ours(
            shape, data, dead=True, backend="sparse", precision="fp32", dead_after_tokens=1 << 40
        ),
        "(b) autograd, cumulative groups": lambda: make_autograd(shape, data, cumulative=True),
        "(c) autograd, each prefix from 0": lambda: make_autograd(shape, data, cumulative=False),
        "(d) SAELens Matryoshka BatchTopK": lambda: make_saelens(shape, data),
    }
    steps = {name: step for name, make in makers.items() if (step := make()) is not None}
    times = timed(steps, rounds)
    b, c = times["(b) autograd, cumulative groups"], times["(c) autograd, each prefix from 0"]
    rows = [
        [name, *ms(t), f"{ratio(t, times['floor']):.2f}", f"{ratio(b, t):.1f}", f"{ratio(c, t):.1f}"]
        for name, t in times.items()
    ]
    title = (
        f"One step, {torch.get_num_threads()} thread(s): batch {shape.batch}, d {shape.d}, d_sae {shape.d_sae}, "
        f"k {shape.k}, {shape.n_groups} groups, {rounds} rounds"
    )
    show(title, ["step", "median ms", "min ms", "x floor", "(b) / this", "(c) / this"], rows)


def scaling_table(what: str, shapes: list[Shape], rounds: int) -> None:
    rows = []
    for shape in shapes:
        data = make_data(shape)
        times = timed(
            {
                "floor": make_floor(shape, data),
                "fp32": make_ours(shape, data, backend="sparse", precision="fp32"),
                "bf16": make_ours(shape, data, backend="sparse", precision="bf16"),
            },
            rounds,
        )
        floor = times["floor"]
        cells = [cell for name in ("floor", "fp32", "bf16") for cell in ms(times[name])]
        value = getattr(shape, what)
        rows.append([f"{value}", *cells, f"{ratio(times['fp32'], floor):.2f}", f"{ratio(times['bf16'], floor):.2f}"])
    header = [what, "floor ms", "min", "fp32 ms", "min", "bf16 ms", "min", "fp32 / floor", "bf16 / floor"]
    show(f"Scaling with {what}, {torch.get_num_threads()} thread(s), {rounds} rounds", header, rows)


def groups_table(shape: Shape, counts: list[int], rounds: int) -> None:
    """All counts in the same rounds, as the difference between them is what is asked."""
    data = make_data(shape)
    steps = {str(n): make_ours(replace(shape, n_groups=n), data, backend="sparse", precision="fp32") for n in counts}
    times = timed(steps, rounds)
    one = times[str(counts[0])]
    rows = [[name, *ms(t), f"{ratio(t, one):.3f}"] for name, t in times.items()]
    title = f"Groups, fp32, {torch.get_num_threads()} thread(s), {rounds} rounds"
    show(title, ["groups", "median ms", "min ms", f"x {counts[0]} group"], rows)


def peak_extra_bytes(shape: Shape, precision: str, *, dead: bool) -> int:
    """Resident memory that three steps add at their peak to weights, moments and data. Linux; in a fresh process."""
    data = make_data(shape, n_batches=2)
    warm = Shape(batch=64, d=64, d_sae=256, k=4, n_groups=2)
    small = make_ours(warm, make_data(warm, 1), backend="sparse", precision=precision)
    small()  # thread pools and kernels are in memory before the count starts
    step = make_ours(shape, data, dead=dead, backend="sparse", precision=precision)
    for tensor in (data.W, *[t for batch in data.batches for t in batch]):
        tensor.add_(0)
    # moments start as untouched zero pages; touch everything that is weight or optimizer
    state = step.__closure__
    assert state is not None
    for cell in state:
        if isinstance(cell.cell_contents, StepState):
            for tensor in cell.cell_contents.tensors().values():
                tensor.add_(0)
    ctypes.CDLL(None).malloc_trim(0)  # or pages freed by the set-up would hide what a step takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; the memory table needs Linux")


def memory_table(shape: Shape, sizes: list[int]) -> None:
    rows = []
    for precision, dead in (("fp32", False), ("bf16", False), ("fp32", True)):
        cells = []
        for d_sae in sizes:
            command = [
                sys.executable,
                "-m",
                "benchmarks.train_step",
                "--memory-of",
                str(d_sae),
                precision,
                str(int(dead)),
            ]
            root = Path(__file__).resolve().parents[1]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
            cells.append(int(done.stdout) / 2**20)
        label = precision + (", half of the latents dead" if dead else "")
        rows.append([label, *[f"{c:.0f}" for c in cells], f"{cells[-1] / cells[0]:.2f}"])
    header = ["MiB at d_sae =", *map(str, sizes), "last / first"]
    show(f"Peak extra memory of a step (batch {shape.batch}, d {shape.d}), weights and Adam aside", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the main table only, in few rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts of the main table")
    parser.add_argument("--rounds", type=int, default=None, help="rounds a table (default 15, 5 with --quick)")
    parser.add_argument("--tables", nargs="+", default=["main", "groups", "d_sae", "k", "memory"])
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape()
    if options.memory_of:
        d_sae, precision, dead = options.memory_of
        torch.set_num_threads(1)
        print(peak_extra_bytes(replace(shape, d_sae=int(d_sae)), precision, dead=dead == "1"))
        return
    rounds = options.rounds or (5 if options.quick else 15)
    tables = ["main"] if options.quick else options.tables
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f} at start"
    )
    for n_threads in options.threads:
        torch.set_num_threads(n_threads)
        if "main" in tables:
            main_table(shape, rounds)
        if "groups" in tables:
            groups_table(shape, [1, 2, 4, 8], rounds)
    torch.set_num_threads(options.threads[0])
    few = max(3, rounds // 3)
    if "d_sae" in tables:
        scaling_table("d_sae", [replace(shape, d_sae=n) for n in (2048, 4096, 8192, 16384, 32768, 65536)], few)
    if "k" in tables:
        scaling_table("k", [replace(shape, k=n) for n in (16, 32, 64, 128, 256)], few)
    if "memory" in tables:
        memory_table(shape, [8192, 65536])
    print(f"\nload {os.getloadavg()[0]:.1f} at end")


if __name__ == "__main__":
    main()
