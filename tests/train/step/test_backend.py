"""What `auto` takes on which device."""

from __future__ import annotations

import pytest
import torch

from train.step.backend import has_fast_bf16, search_type


@pytest.mark.parametrize(
    ("capability", "taken"),
    [
        ((6, 1), None),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_the_search_runs_in_what_a_gpu_has_units_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], taken: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert search_type("auto", torch.device("cuda")) == taken


def test_what_is_asked_for_is_taken_anywhere() -> None:
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert search_type("fp32", device) is None
        assert search_type("bf16", device) == torch.bfloat16
        assert search_type("fp16", device) == torch.float16


def test_a_cpu_never_takes_fp16() -> None:
    cpu = torch.device("cpu")
    assert search_type("auto", cpu) == (torch.bfloat16 if has_fast_bf16(cpu) else None)
