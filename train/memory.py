"""How much memory a fleet takes, reckoned before the start and refused when it is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from matryoshka.errors import UserError

from .config import TrainConfig
from .plan import Plan

_READ_AHEAD_BATCHES = 6
"""Batches between the reader and the step: those in the queue, the one being filled and the one in use."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one member."""

    held: int
    """Weights, both Adam moments and counters, all the time."""
    step: int
    """Gradients and activations, while this member takes its step."""
    snapshot: int
    """A copy of the state and the folded weights, in the memory of the CPU, while a checkpoint is written."""


def member_need(
    config: TrainConfig, plan: Plan, *, d_in: int, d_out: int, device: torch.device, n_parts: int = 1
) -> Need:
    """Bytes that one run takes beside the stream. Equations: see the fields of Need; all tensors are fp32.

    `n_parts`: ranks over which the latents are spread; a checkpoint is written whole by one of them.
    """
    d_sae, batch = -(-plan.d_sae // n_parts), config.batch_tokens
    n_weights = d_sae * (d_in + d_out + 1) + d_out + (d_in * d_out if config.skip else 0)
    held = 12 * n_weights + 8 * d_sae
    k = max(config.k, plan.k_start)
    # x, y, every prefix's reconstruction and residual, lists of the kept and of the dead latents' entries, gradients.
    n_prefixes = config.sampled_prefixes or len(plan.group_sizes)
    step = 4 * batch * (2 * d_in + (2 * n_prefixes + 3) * d_out) + 48 * batch * (k + plan.k_aux)
    step += 4 * n_weights
    # On a CPU `auto` goes dense for small dictionaries only.
    if config.backend == "dense" or (config.backend == "auto" and device.type == "cuda"):
        step += 12 * batch * d_sae
    return Need(held=held, step=step, snapshot=n_parts * (held + 20 * n_weights))


def stream_need(config: TrainConfig, *, d_in: int, d_out: int) -> int:
    """Bytes of the stream: two buffers and the batches that are read ahead, bfloat16."""
    return 2 * (d_in + d_out) * (2 * config.buffer_tokens + _READ_AHEAD_BATCHES * config.batch_tokens)


def check_memory(needs: Mapping[str, Need], stream: int, device: torch.device) -> None:
    """Raise UserError when the members and the stream cannot fit into what is free now."""
    if not needs:
        return
    on_device = sum(need.held for need in needs.values()) + max(need.step for need in needs.values())
    on_cpu = stream + max(need.snapshot for need in needs.values())
    if device.type == "cuda":
        _refuse(needs, on_device, torch.cuda.mem_get_info(device)[0], str(device))
    elif device.type == "cpu":
        on_cpu += on_device
    _refuse(needs, on_cpu, free_memory(), "the CPU")


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


def _refuse(needs: Mapping[str, Need], wanted: int, free: int | None, where: str) -> None:
    if free is None or wanted <= free:
        return
    largest = sorted(needs, key=lambda name: -needs[name].held)[:3]
    each = ", ".join(f"{name} {(needs[name].held + needs[name].step) / 1e9:.2f} GB" for name in largest)
    raise UserError(
        f"training needs about {wanted / 1e9:.2f} GB on {where}, and {max(free, 0) / 1e9:.2f} GB are free (largest: "
        f"{each}). Use smaller group_sizes or batch_tokens or a smaller buffer_tokens, or fewer runs at once"
    )
