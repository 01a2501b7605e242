"""Rates that the ledger divides by. What is written for a GPU is from data sheets and published measurements: the
project has not run on one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.ledger.counting import Operation

_TOPK_SECONDS = 0.12e-3
"""A top-k over many blocks, however little it reads: each block looks through the counts of all."""
_HOST_SECONDS = 8e-6
"""The host takes about this long to start an operator in eager mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A GPU. Rates are what good kernels reach, peaks are the data sheet's; FLOP/s and bytes/s."""

    name: str
    low: torch.dtype
    """What the search runs in: bf16 from compute capability 8 on, fp16 before."""
    low_flops: float
    fp32_flops: float
    memory: float
    kernel: float
    """Seconds between two kernels, at least."""
    peak_low_flops: float
    peak_fp32_flops: float
    peak_memory: float

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Device time on paper: each operator takes the larger of its bytes and its FLOP, and its kernels' starts."""
        total = 0.0
        for operation in operations:
            rate = self.fp32_flops if operation.flop_dtype == torch.float32 else self.low_flops
            total += max(operation.n_bytes / self.memory, operation.flops / rate)
            total += _TOPK_SECONDS if operation.is_topk else operation.n_kernels * self.kernel
        return total

    def floor(self, *, d_in: int, d_out: int, d_sae: int, batch: int, low: bool) -> float:
        """The encoder's GEMM and fused Adam (28 bytes a weight) at the peaks; `low`: the GEMM in bf16 or fp16."""
        gemm = 2 * batch * d_in * d_sae / (self.peak_low_flops if low else self.peak_fp32_flops)
        return gemm + 28 * d_sae * (d_in + d_out) / self.peak_memory


def host_seconds(operations: Iterable[Operation]) -> float:
    """Time that the host needs to start them all; it is hidden while the device needs longer."""
    return _HOST_SECONDS * sum(1 for _ in operations)


MACHINES = (
    Machine(
        name="H100",
        low=torch.bfloat16,
        low_flops=600e12,
        fp32_flops=50e12,
        memory=2.7e12,
        kernel=2.5e-6,
        peak_low_flops=989e12,
        peak_fp32_flops=67e12,
        peak_memory=3.35e12,
    ),
    Machine(
        name="A100",
        low=torch.bfloat16,
        low_flops=230e12,
        fp32_flops=17e12,
        memory=1.4e12,
        kernel=3e-6,
        peak_low_flops=312e12,
        peak_fp32_flops=19.5e12,
        peak_memory=2.0e12,
    ),
    Machine(
        name="RTX 4090",
        low=torch.bfloat16,
        low_flops=140e12,
        fp32_flops=60e12,
        memory=0.9e12,
        kernel=2.5e-6,
        peak_low_flops=165e12,
        peak_fp32_flops=82.6e12,
        peak_memory=1.008e12,
    ),
    Machine(
        name="T4",
        low=torch.float16,
        low_flops=22e12,
        fp32_flops=4.5e12,
        memory=0.24e12,
        kernel=4e-6,
        peak_low_flops=65e12,
        peak_fp32_flops=8.1e12,
        peak_memory=0.32e12,
    ),
)
