"""What `auto` means for the device and the dtype."""

from __future__ import annotations

import pytest
import torch

from matryoshka.devices import resolve_device, resolve_dtype
from matryoshka.errors import UserError


def test_auto_device_and_dtype(monkeypatch):
    assert resolve_dtype("bf16") == resolve_dtype("bfloat16") == torch.bfloat16
    assert [resolve_dtype(d) for d in ("float16", "fp16", "float32")] == [torch.float16, torch.float16, torch.float32]
    assert resolve_dtype("auto", "mps") == torch.float32
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: c)
        assert resolve_dtype("auto", "cuda") == dtype
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        assert resolve_dtype("auto", "cpu") == dtype
    for cuda, mps, device in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert resolve_device("auto").type == device
    with pytest.raises(UserError, match="float8"):
        resolve_dtype("float8")
    with pytest.raises(UserError, match="nonsense"):
        resolve_device("nonsense")
