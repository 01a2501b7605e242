"""The bound of the number of dead latents: never too small, asked for seldom, read long after it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import train.step.dead_capacity as module
from train.step.dead_capacity import DeadCapacity

DEAD_AFTER, ROWS, D_SAE = 480, 10, 500


def since_fired(step: int) -> Tensor:
    """Half of the latents fire again and again, the others never after their first steps."""
    latent = torch.arange(D_SAE)
    last = torch.where(latent % 2 == 0, (latent % 37) + 5, step - (step + latent) % 6)
    return ROWS * (step - last.clamp_max(step))


@pytest.mark.parametrize("horizon", [2, 6, 32])
def test_every_dead_latent_has_room_in_every_step(monkeypatch: pytest.MonkeyPatch, horizon: int) -> None:
    monkeypatch.setattr(module, "HORIZON", horizon)
    monkeypatch.setattr(module, "_LEAST", 1)
    capacity, asked = DeadCapacity(), []

    def largest(count: Tensor) -> Tensor:
        asked.append(int(count))
        return count

    found, dead = [], []
    for step in range(100):
        since = since_fired(step)
        dead.append(int((since >= DEAD_AFTER).sum()))
        found.append(capacity.at(since, DEAD_AFTER, ROWS, largest))
    assert all(room >= n for room, n in zip(found, dead, strict=True))
    assert dead[0] == 0 < max(dead) < D_SAE
    assert found[-1] <= dead[-1] * 9 / 8 + 1
    assert len(asked) <= 100 / (min(horizon, 6) // 2) + 1  # an eighth of the 48 steps until a latent is dead is 6


def test_nothing_is_listed_while_nothing_can_be_dead() -> None:
    capacity = DeadCapacity()
    for step in range(20):
        assert capacity.at(torch.full((D_SAE,), 10 * step), 10_000, 10, lambda count: count) == 0


def test_the_largest_of_all_ranks_decides() -> None:
    since = torch.zeros(D_SAE, dtype=torch.int64)
    assert DeadCapacity().at(since, 10_000, 1, lambda count: count + 100) == 128
    assert DeadCapacity().at(since, 10_000, 1, lambda count: count + 490) == 500  # no more than there are
