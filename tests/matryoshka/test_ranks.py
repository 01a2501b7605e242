"""Which process of several this is, and what it does alone."""

from __future__ import annotations

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.ranks import Rank


def test_jobs_are_dealt_in_turn() -> None:
    for world in (1, 2, 3):
        owners = [[rank for rank in range(world) if Rank(rank, world).owns(job)] for job in range(10)]
        assert owners == [[job % world] for job in range(10)]
    assert [Rank(rank, 2).is_first for rank in range(2)] == [True, False]


def test_the_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Rank.from_environment() == Rank(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Rank.from_environment() == Rank(5, 8, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices = [Rank.from_environment().device(name) for name in ("auto", "cuda", "cpu", "cuda:3")]
    assert devices == ["cuda:1", "cuda:1", "cpu", "cuda:3"]
    assert Rank().device("auto") == "auto"
    for value, what in (("8", "RANK is 8 of WORLD_SIZE 8"), ("x", "should be numbers, as torchrun")):
        monkeypatch.setenv("RANK", value)
        with pytest.raises(UserError, match=what):
            Rank.from_environment()


def test_a_single_process_waits_for_nobody() -> None:
    ranks = Rank()
    with ranks.together():
        ranks.wait()
        assert ranks.agree(7) == 7
