"""Matrix products whose operands may be bf16 or fp16 while sums and results are fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def low_copy(values: Tensor, low: torch.dtype | None) -> Tensor:
    """`values` as operands of a product: rounded to `low`, or as they are where that is None."""
    return values if low is None else values.to(low)


def gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with fp32 accumulators and an fp32 result; a [m, n] and b [n, k] are of one type."""
    if a.dtype == torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if a.is_cuda:
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    # A CPU has no such kernel; products of bf16 or fp16 numbers are exact in fp32.
    return gemm(a.float(), b.float(), out)
