"""Which of the two backends a step should use, and in which precision its encoder GEMM should run: the cost model."""

from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["sparse", "dense"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


DEAD_SHARE = 0.02
"""Of the latents, for the aux loss's part in the comparison: few are dead for most of a run."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates the model divides by, FLOP/s and bytes/s."""

    gemm_flops: float
    """Of the dense backend's products."""
    gather_bytes: float
    """At which scattered rows can be gathered."""
    fp32_flops: float
    copy_bytes: float
    """At which memory is read and written in order."""


# CPU: measured by benchmarks/train_step.py on two Zen 4 cores; only the ratio of the two matters.
CPU = Machine(gemm_flops=190e9, gather_bytes=70e9, fp32_flops=190e9, copy_bytes=70e9)
# CUDA: what the ledger divides by (benchmarks/ledger/machines.py): an A100, and a T4, whose gradients fp16 cannot hold.
CUDA_BF16 = Machine(gemm_flops=230e12, gather_bytes=1.4e12, fp32_flops=17e12, copy_bytes=1.4e12)
CUDA_FP32 = Machine(gemm_flops=4.5e12, gather_bytes=0.24e12, fp32_flops=4.5e12, copy_bytes=0.24e12)


def costs(machine: Machine, *, d_in: int, d_out: int, d_sae: int, k: int, batch: int) -> dict[Backend, float]:
    """Seconds behind the encoder for each backend on a CPU.

    dense  = (3 d_out + d_in) * 2 * batch * d_sae / gemm_flops     four GEMMs: decode, d_acts, dW_dec, dW_enc
    sparse = (3 d_out + d_in) * 4 * batch * k     / gather_bytes   the same four, a row of floats per kept entry
    """
    width = 3 * d_out + d_in
    return {
        "dense": width * 2 * batch * d_sae / machine.gemm_flops,
        "sparse": width * 4 * batch * k / machine.gather_bytes,
    }


def gpu_costs(
    machine: Machine, *, d_in: int, d_out: int, d_sae: int, k: int, batch: int, low: bool
) -> dict[Backend, float]:
    """Seconds behind the search on a GPU: what `costs` counts, and what differs between the backends besides.

    dense also casts W_dec, fills and reads two matrices [batch, d_sae], and computes a quarter of the entries again in
    fp32; sparse computes nine eighths of them again (`low`: the search was not in fp32), and does the five
    products of the aux loss's dead latents in fp32.
    """
    both = costs(machine, d_in=d_in, d_out=d_out, d_sae=d_sae, k=k, batch=batch)
    again = 4 * d_in * k * batch / machine.gather_bytes if low else 0.0
    of_dead = (3 * d_out + 2 * d_in) * 2 * batch * DEAD_SHARE * d_sae
    moved = 6 * d_sae * d_out + 8 * batch * d_sae
    dense = both["dense"] + moved / machine.copy_bytes + again / 4 + of_dead / machine.gemm_flops
    return {"dense": dense, "sparse": both["sparse"] + 9 / 8 * again + of_dead / machine.fp32_flops}


def choose_backend(
    device: torch.device, *, low: torch.dtype | None, d_in: int, d_out: int, d_sae: int, k: int, batch: int
) -> Backend:
    """The cheaper backend; `low`: what the search runs in, and on CUDA the dense backend's products when it is bf16."""
    sizes = {"d_in": d_in, "d_out": d_out, "d_sae": d_sae, "k": k, "batch": batch}
    if device.type == "cuda":
        machine = CUDA_BF16 if low == torch.bfloat16 else CUDA_FP32
        both = gpu_costs(machine, **sizes, low=low is not None)
    else:
        both = costs(CPU, **sizes)
    return "sparse" if both["sparse"] <= both["dense"] else "dense"


def search_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type that the encoder's GEMM looks for candidates in; None for fp32.

    auto is bf16 where that is fast, on older GPUs with matrix units (compute capability 7: V100, T4) fp16, else fp32.
    """
    if precision == "auto":
        if has_fast_bf16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 7 else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 GEMMs have hardware behind them: AVX512_BF16 or AMX on a CPU, compute capability 8 on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) or bool(capabilities.get("amx_bf16"))
