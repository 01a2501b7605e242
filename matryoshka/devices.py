"""Which device to run on, and which dtype it multiplies fastest."""

from __future__ import annotations

import torch

from matryoshka.errors import UserError


def resolve_device(device: str = "auto") -> torch.device:
    """A torch device; "auto" is CUDA if there is one, else MPS, else CPU. Raises UserError for an absent one.

    A numbered GPU becomes the current one of this process: what is not told a device (an event, a stream, a kernel's
    workspace, a collective) then takes the same.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f'The device "{device}" cannot be used here ({reason}). Use auto, cpu, cuda, cuda:1 or mps, whichever '
            "this machine and this build of torch have."
        ) from error
    if resolved.type == "cuda" and resolved.index is not None:
        torch.cuda.set_device(resolved)
    return resolved


def resolve_dtype(dtype: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to load weights in: bfloat16, float16, float32 (or bf16, fp16, fp32), or "auto".

    "auto" is bfloat16 where the device multiplies it natively, float16 on older CUDA devices, else float32.
    """
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    name = names.get(dtype, dtype)
    if name in names.values():
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f'"{dtype}" is not a dtype for weights. Use auto, bfloat16, float16 or float32.')
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        # Private names: torch has no public question for these two instruction sets in the versions we support.
        checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        if any(check is not None and check() for check in checks):
            return torch.bfloat16
    return torch.float32
