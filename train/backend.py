"""Which of the two backends a step should use, and in which precision its encoder GEMM should run: the cost model."""

from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["sparse", "dense"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates the model divides by: dense GEMM FLOP/s and the bytes/s at which scattered rows can be gathered."""

    gemm_flops: float
    gather_bytes: float


# CPU: measured by benchmarks/train_step.py on two Zen 4 cores; only the ratio of the two matters.
# CUDA: about half the data-sheet peaks of an A100, with bf16 matrix units and without; assumptions, never run on a GPU.
CPU = Machine(gemm_flops=190e9, gather_bytes=70e9)
CUDA_BF16 = Machine(gemm_flops=150e12, gather_bytes=0.9e12)
CUDA_FP32 = Machine(gemm_flops=10e12, gather_bytes=0.9e12)

DENSE_GEMMS = 4  # decode, d_acts, dW_dec, dW_enc; the encoder's own is paid by both
GATHERS = 4  # the same four, each reading one row of d_in or d_out floats per kept entry


def costs(machine: Machine, *, d_in: int, d_out: int, d_sae: int, k: int, batch: int) -> dict[Backend, float]:
    """Seconds behind the encoder for each backend.

    dense  = (3 d_out + d_in) * 2 * batch * d_sae / gemm_flops
    sparse = (3 d_out + d_in) * 4 * batch * k     / gather_bytes
    """
    width = 3 * d_out + d_in
    return {
        "dense": width * 2 * batch * d_sae / machine.gemm_flops,
        "sparse": width * 4 * batch * k / machine.gather_bytes,
    }


def choose_backend(
    device: torch.device, *, bf16: bool, d_in: int, d_out: int, d_sae: int, k: int, batch: int
) -> Backend:
    """The cheaper backend by `costs`; `bf16`: how GEMMs run on CUDA (on a CPU only the encoder's, which both pay)."""
    machine = CPU if device.type != "cuda" else CUDA_BF16 if bf16 else CUDA_FP32
    both = costs(machine, d_in=d_in, d_out=d_out, d_sae=d_sae, k=k, batch=batch)
    return "sparse" if both["sparse"] <= both["dense"] else "dense"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 GEMMs have hardware behind them: AVX512_BF16 or AMX on a CPU, compute capability 8 on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) or bool(capabilities.get("amx_bf16"))
