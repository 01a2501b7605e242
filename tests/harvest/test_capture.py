"""The model's side: batches that shrink and grow, and copies one batch behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harvest.capture import Capture, HostCopies
from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel

POINTS = ["blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out"]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(4, 97, (11, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


class Small:
    """A model whose memory holds `room` contexts; notes the sizes of the batches it was asked for."""

    def __init__(self, lm: LanguageModel, room: int) -> None:
        self.device, self.d_model = lm.device, lm.d_model
        self.asked: list[int] = []
        self._lm, self._room = lm, room

    def capture(self, batch: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        self.asked.append(len(batch))
        if len(batch) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._lm.capture(batch, hook_points)


def test_a_shard_is_position_major_and_complete(lm: LanguageModel, tokens: Tensor) -> None:
    told: list[int] = []
    found = Capture(lm, 4).shard(tokens, POINTS, told.append)
    assert told == [64, 64, 48]
    for name in POINTS:
        wanted = torch.cat([lm.capture(tokens[i : i + 4].long(), [name])[name] for i in (0, 4, 8)])
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], wanted.transpose(0, 1).bfloat16())


def test_too_large_a_batch_is_halved_and_remembered(lm: LanguageModel, tokens: Tensor) -> None:
    small: Any = Small(lm, room=2)
    capture, told = Capture(small, 8), []
    found = capture.shard(tokens, POINTS, told.append)
    assert capture.batch_size == 2
    assert small.asked == [8, 4, 2, 2, 2, 2, 2, 1]
    assert sum(told) == tokens.numel()
    wanted = Capture(lm, 2).shard(tokens, POINTS, told.append)
    assert all(torch.equal(found[name], wanted[name]) for name in POINTS)
    small.asked.clear()
    capture.shard(tokens, POINTS, told.append)
    assert max(small.asked) == 2


def test_a_context_that_does_not_fit_is_an_error(lm: LanguageModel, tokens: Tensor) -> None:
    small: Any = Small(lm, room=0)
    with pytest.raises(UserError, match="does not hold a forward pass of a single context of 16 tokens"):
        Capture(small, 8).shard(tokens, POINTS, lambda _: None)
    assert small.asked == [8, 4, 2, 1]


@pytest.mark.parametrize(("room", "best", "wanted"), [(99, 4, 4), (99, 99, 8), (3, 99, 2), (99, 1, 1)])
def test_the_fastest_batch_size_is_found(
    room: int, best: int, wanted: int, lm: LanguageModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that takes as long for any batch of up to `best` contexts, and proportionally longer for more."""
    clock = 0.0
    small: Any = Small(lm, room)
    real = small.capture

    def capture(batch: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        nonlocal clock
        found = real(batch, hook_points)
        clock += max(1.0, len(batch) / best)
        return found

    monkeypatch.setattr(small, "capture", capture)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    tuned = Capture(small, 1)
    assert tuned.tune(tokens, POINTS) == tuned.batch_size == wanted


@pytest.mark.parametrize("staged", [False, True])
def test_copies_arrive_one_batch_later_at_the_latest(staged: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, 5, 7, generator=generator) for n in (3, 3, 3, 2)]
    buffer = torch.zeros(5, 11, 7, dtype=torch.bfloat16)
    copies, start = HostCopies(staged=staged), 0
    wanted = torch.cat(values).transpose(0, 1).bfloat16()
    for batch, batch_values in enumerate(values):
        copies.put(batch_values, buffer[:, start : start + len(batch_values)])
        copies.next_batch()
        start += len(batch_values)
        settled = max(0, start - len(batch_values)) if staged else start
        assert torch.equal(buffer[:, :settled], wanted[:, :settled]), batch
        assert bool((buffer[:, start:] == 0).all())
        batch_values.zero_()  # the device's memory is used again
    copies.finish()
    assert torch.equal(buffer, wanted)


def test_staging_buffers_are_used_again() -> None:
    copies = HostCopies(staged=True)
    buffer = torch.empty(5, 30, 7, dtype=torch.bfloat16)
    for start in range(0, 30, 3):
        copies.put(torch.ones(3, 5, 7), buffer[:, start : start + 3])
        copies.next_batch()
    copies.finish()
    assert [len(free) for free in copies._free.values()] == [2]
