"""The learning rate at the steps that matter, by hand."""

from __future__ import annotations

import pytest

from train.schedule import KSchedule, Schedule


def test_linear_by_hand() -> None:
    schedule = Schedule(lr=1.0, n_steps=10, warmup_steps=3, decay_steps=4)
    rates = [schedule.at(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_ends_at_the_floor_and_never_reaches_zero_early() -> None:
    schedule = Schedule(lr=2.0, n_steps=100, warmup_steps=0, decay_steps=50, decay="cosine", floor=0.1)
    rates = [schedule.at(step) for step in range(100)]
    assert rates[:50] == [2.0] * 50
    assert all(a > b for a, b in zip(rates[50:], rates[51:], strict=False))
    assert rates[-1] == pytest.approx(0.2, rel=0.02)
    assert min(rates) >= 0.2


def test_no_warmup_no_decay_is_constant() -> None:
    schedule = Schedule(lr=3.0, n_steps=5, warmup_steps=0, decay_steps=0)
    assert [schedule.at(step) for step in range(5)] == [3.0] * 5


def test_k_goes_down_or_up_in_equal_steps() -> None:
    assert [KSchedule(start=20, end=4, n_steps=4).at(step) for step in range(6)] == [20, 16, 12, 8, 4, 4]
    assert [KSchedule(start=1, end=4, n_steps=3).at(step) for step in range(5)] == [1, 2, 3, 4, 4]
    assert [KSchedule(start=4, end=4, n_steps=0).at(step) for step in range(2)] == [4, 4]
