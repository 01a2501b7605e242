"""How much memory a fleet takes, estimated before the start and refused when it is not there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from matryoshka.errors import UserError

from .calibrate import rows_at_once
from .config import TrainConfig
from .plan import Plan
from .step.backend import choose_backend, search_type
from .step.step import BLOCK_LATENTS

_SELECTION = 8 << 20
"""Scratch in which a step looks for the activations to keep, of each member on a CPU (train/step/selection.py)."""
_HOLES = 1.2
"""The C library keeps a part of what is freed, in pieces (benchmarks/fleet.py --tables memory)."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one member."""

    held: int
    """Weights, both Adam moments, counters and scratch, all the time."""
    step: int
    """Gradients and activations while this member takes its step, or what calibrating its threshold takes."""
    snapshot: int
    """A copy of the state and the folded weights twice, in the memory of the CPU, while a checkpoint is written."""


def member_estimate(
    config: TrainConfig, plan: Plan, *, d_in: int, d_out: int, device: torch.device, n_parts: int = 1
) -> MemoryEstimate:
    """Bytes that one run takes beside the stream. Equations: see the fields of MemoryEstimate; all tensors are fp32.

    `n_parts`: ranks over which the latents are spread; a checkpoint is written whole by one of them.
    """
    d_sae, batch = -(-plan.d_sae // n_parts), config.batch_tokens
    n_weights = d_sae * (d_in + d_out + 1) + d_out + (d_in * d_out if config.skip else 0)
    held = 12 * n_weights + 8 * d_sae + (_SELECTION if device.type == "cpu" else 0)
    k = max(config.k, plan.k_start)
    # x, y, every prefix's reconstruction and residual, lists of the kept and of the dead latents' entries, gradients.
    n_prefixes = config.sampled_prefixes or len(plan.group_sizes)
    step = 4 * batch * (2 * d_in + (2 * n_prefixes + 3) * d_out) + 48 * batch * (k + plan.k_aux)
    step += 4 * n_weights
    dense = _is_dense(config, plan, d_in=d_in, d_out=d_out, device=device)
    if dense:
        step += 12 * batch * d_sae
    elif device.type == "cuda":
        # as many dead latents' activations as are held as a matrix; the dense backend's matrices leave room for them
        step += 8 * batch * min(d_sae, BLOCK_LATENTS * plan.k_aux)
    n_rows = config.calibration_tokens
    calibration = 20 * config.k * n_rows + 12 * min(n_rows, rows_at_once(d_sae)) * d_sae
    return MemoryEstimate(held=held, step=max(step, calibration), snapshot=n_parts * 20 * n_weights)


def estimated_bytes(estimates: Sequence[MemoryEstimate], stream: int) -> int:
    """Bytes that a fleet takes on a CPU: one member steps and one snapshot is written at a time."""
    steps = sum(estimate.held for estimate in estimates) + max(estimate.step for estimate in estimates)
    return int(_HOLES * (steps + max(estimate.snapshot for estimate in estimates) + stream))


def check_memory(estimates: Mapping[str, MemoryEstimate], stream: int, device: torch.device) -> None:
    """Raise UserError when the members and the stream cannot fit into what is free now."""
    if not estimates:
        return
    each = list(estimates.values())
    if device.type == "cpu":
        _refuse(estimates, estimated_bytes(each, stream), free_memory(), "the CPU")
        return
    if device.type == "cuda":
        on_device = sum(estimate.held for estimate in each) + max(estimate.step for estimate in each)
        _refuse(estimates, on_device, torch.cuda.mem_get_info(device)[0], str(device))
    _refuse(estimates, stream + max(estimate.snapshot for estimate in each), free_memory(), "the CPU")


@contextmanager
def memory_of(
    name: str, config: TrainConfig, plan: Plan, *, d_in: int, d_out: int, device: torch.device
) -> Iterator[None]:
    """While the run `name` starts or takes a step: raise UserError where the device's memory ends, with what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        batch, dense = config.batch_tokens, _is_dense(config, plan, d_in=d_in, d_out=d_out, device=device)
        buffers = {
            f"the gradient of a side's weights, {plan.d_sae} latents x {max(d_in, d_out)}": plan.d_sae
            * max(d_in, d_out),
            f"the reconstructions of all prefixes of {batch} rows": batch * d_out * (len(plan.group_sizes) + 1),
        }
        if dense:
            buffers[f"the activations of {batch} rows x {plan.d_sae} latents, of the dense backend"] = (
                batch * plan.d_sae
            )
        largest = max(buffers, key=lambda buffer: buffers[buffer])
        ways = ["fewer runs at once", "in a new run, smaller group_sizes or batch_tokens"]
        if dense:
            ways.insert(0, "--set train.backend=sparse, with which the run continues")
        raise UserError(
            f"the memory of {device} is not enough for the run {name} ({_first_line(error)}). The largest part of a "
            f"step is {largest}: {4 * buffers[largest] / 1e9:.2f} GB, several times. What was saved is good. Use "
            f"{'; or '.join(ways)}"
        ) from error


def _is_dense(config: TrainConfig, plan: Plan, *, d_in: int, d_out: int, device: torch.device) -> bool:
    """Whether a step takes the dense backend; where there is no GPU to ask, what one with bf16 takes."""
    if config.backend != "auto" or device.type != "cuda":
        return config.backend == "dense"  # on a CPU `auto` goes dense for small dictionaries only
    low = torch.bfloat16
    if config.precision != "auto" or torch.cuda.is_available():
        low = search_type(config.precision, device)
    sizes = {"d_in": d_in, "d_out": d_out, "d_sae": plan.d_sae, "batch": config.batch_tokens}
    # A larger k makes a step dense: where k changes, the larger end decides.
    return choose_backend(device, low=low, k=max(config.k, plan.k_start), **sizes) == "dense"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def release_memory() -> None:
    """Return what was freed to the system, where the C library can be told to (glibc): it fills holes last."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def free_memory() -> int | None:
    """Bytes that this process may still take, None where the system does not say: RAM, and the limit of the cgroup."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" is no number: no limit
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(counts["file"]))  # pages of files are given back when asked for
    except (OSError, ValueError, KeyError):
        return free


def _refuse(estimates: Mapping[str, MemoryEstimate], wanted: int, free: int | None, where: str) -> None:
    if free is None or wanted <= free:
        return
    largest = sorted(estimates, key=lambda name: -estimates[name].held)[:3]
    each = ", ".join(f"{name} {(estimates[name].held + estimates[name].step) / 1e9:.2f} GB" for name in largest)
    raise UserError(
        f"training needs about {wanted / 1e9:.2f} GB on {where}, and {max(free, 0) / 1e9:.2f} GB are free (largest: "
        f"{each}). Use smaller group_sizes or batch_tokens or a smaller buffer_tokens, or fewer runs at once"
    )
