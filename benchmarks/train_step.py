"""What one training step costs, against its own floor and against the ways it is usually written.

    python benchmarks/train_step.py            everything (about half an hour on two cores)
    python benchmarks/train_step.py --quick    the main table only, fewer rounds

Every table interleaves its contestants: one round times each of them once, in turn. A ratio is the median over rounds
of (contestant / floor) WITHIN a round, so that a machine that is busy for a while slows both sides of it. The floor is
the bare fp32 encoder GEMM into a buffer that exists already, plus fused Adam over W_enc and W_dec.
"""

import argparse
import ctypes
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from train.step import StepSettings, StepState, TrainStep

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem size; groups double in size, as 1/16, 1/8, ... of d_sae."""

    batch: int = 2048
    d: int = 640
    d_sae: int = 10240
    k: int = 64
    n_groups: int = 4

    @property
    def group_sizes(self) -> tuple[int, ...]:
        sizes: list[int] = []
        left = self.d_sae
        for _ in range(self.n_groups - 1):
            sizes.insert(0, left // 2)
            left -= left // 2
        return (left, *sizes)

    def settings(self, **changes) -> StepSettings:
        return StepSettings(
            **{
                "group_sizes": self.group_sizes,
                "k": self.k,
                "k_aux": self.d // 2,
                "dead_after_tokens": 1 << 40,
                "target_variance": float(self.d),
                **changes,
            }
        )


@dataclass(frozen=True)
class Data:
    """Seeded weights and batches for one shape: rows are sparse mixtures of planted directions plus noise."""

    W: Tensor
    batches: list[tuple[Tensor, Tensor]]


def make_data(shape: Shape, n_batches: int = 4) -> Data:
    g = torch.Generator().manual_seed(0)
    W = F.normalize(torch.randn(shape.d_sae, shape.d, generator=g), dim=1)
    n_true = 2 * shape.d
    source = F.normalize(torch.randn(n_true, shape.d, generator=g), dim=1)
    target = F.normalize(torch.randn(n_true, shape.d, generator=g), dim=1)
    batches = []
    for _ in range(n_batches):
        code = torch.rand(shape.batch, n_true, generator=g)
        code = torch.where(code < 0.03, 1 + torch.rand(code.shape, generator=g), 0.0)
        x, y = code @ source, code @ target
        noise = 0.3 * torch.randn(x.shape, generator=g)
        batches.append(((x - x.mean(0)) / x.std() + noise, (y - y.mean(0)) / y.std()))
    return Data(W, batches)


def make_floor(shape: Shape, data: Data) -> Step:
    """The bare encoder GEMM and fused Adam: nothing that trains this model in fp32 can do less."""
    out, b_enc, x = torch.empty(shape.batch, shape.d_sae), torch.zeros(shape.d_sae), data.batches[0][0]
    params = [data.W.clone(), data.W.clone()]
    grads = [torch.full_like(data.W, 1e-4) for _ in params]
    moments = [[torch.zeros_like(data.W) for _ in params] for _ in range(2)]

    def floor() -> None:
        torch.addmm(b_enc, x, data.W.t(), out=out)
        steps = [torch.tensor(5.0) for _ in params]
        adam(
            params,
            grads,
            *moments,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=1e-4,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    return floor


def make_ours(shape: Shape, data: Data, *, dead: bool = False, **changes) -> Step:
    state = StepState.create(W_enc=data.W, b_enc=torch.zeros(shape.d_sae), W_dec=data.W, b_dec=torch.zeros(shape.d))
    step = TrainStep(shape.settings(**changes), state, "cpu")
    turn = 0

    def ours() -> None:
        nonlocal turn
        if dead:
            state.tokens_since_fired[::2] = 1 << 41
        step(*data.batches[turn % len(data.batches)], lr=1e-4)
        turn += 1

    return ours


def make_autograd(shape: Shape, data: Data, *, cumulative: bool) -> Step:
    """The step as it is usually written, whole: dense autograd, projection, clip, fused Adam, renormalisation.

    cumulative: each group decoded once and summed up; otherwise every prefix decoded again from latent 0.
    """
    params = [torch.nn.Parameter(t.clone()) for t in (data.W, torch.zeros(shape.d_sae), data.W, torch.zeros(shape.d))]
    W_enc, b_enc, W_dec, b_dec = params
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)
    turn = 0

    def autograd() -> None:
        nonlocal turn
        x, y = data.batches[turn % len(data.batches)]
        turn += 1
        acts = F.relu(x @ W_enc.t() + b_enc)
        top = acts.flatten().topk(shape.k * shape.batch, sorted=False)
        acts = torch.zeros(acts.numel()).scatter_(0, top.indices, top.values).view(acts.shape)
        loss, recon, start = torch.zeros(()), b_dec.expand(shape.batch, shape.d), 0
        for size in shape.group_sizes:
            end = start + size
            # a running sum of groups, or every prefix again from latent 0
            first, onto = (start, recon) if cumulative else (0, b_dec)
            recon = onto + acts[:, first:end] @ W_dec[first:end]
            loss = loss + (recon - y).pow(2).sum(1).mean() / shape.d / shape.n_groups
            start = end
        optimizer.zero_grad()
        loss.backward()
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return autograd


def make_saelens(shape: Shape, data: Data) -> Step | None:
    """SAELens' own Matryoshka BatchTopK forward pass and the lines of its SAETrainer._train_step around it.

    It is an autoencoder (x is its own target), which costs the same as a transcoder of d_in = d_out; its bookkeeping of
    firing counts is left out, in its favour.
    """
    logging.disable(logging.WARNING)
    try:
        from sae_lens.saes.matryoshka_batchtopk_sae import (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
        )
        from sae_lens.saes.sae import TrainStepInput
    except ImportError:
        return None
    ends = [sum(shape.group_sizes[: i + 1]) for i in range(shape.n_groups)]
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.d_sae, k=shape.k, matryoshka_widths=ends, dtype="float32", device="cpu"
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(data.W.t())
        sae.W_dec.copy_(data.W)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, betas=(0.9, 0.999))
    no_dead = torch.zeros(shape.d_sae, dtype=torch.bool)
    turn = 0

    def saelens() -> None:
        nonlocal turn
        x = data.batches[turn % len(data.batches)][0]
        turn += 1
        step_input = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=no_dead, n_training_steps=turn, is_logging_step=False
        )
        sae.training_forward_pass(step_input).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return saelens


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
        "bare encoder GEMM, fp32": lambda: _gemm(shape, data, torch.float32),
        "bare encoder GEMM, bf16": lambda: _gemm(shape, data, torch.bfloat16),
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


def _gemm(shape: Shape, data: Data, dtype: torch.dtype) -> Step:
    x, W, b = data.batches[0][0].to(dtype), data.W.to(dtype), torch.zeros(shape.d_sae, dtype=dtype)
    out = torch.empty(shape.batch, shape.d_sae, dtype=dtype)
    return lambda: torch.addmm(b, x, W.t(), out=out)


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
            command = [sys.executable, __file__, "--memory-of", str(d_sae), precision, str(int(dead))]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
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
