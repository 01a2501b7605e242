"""The learning rate and k as functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linear warm-up, then constant, then a fall over the last `decay_steps` to `floor` x `lr`."""

    lr: float
    n_steps: int
    warmup_steps: int
    decay_steps: int
    decay: Literal["linear", "cosine"] = "linear"
    floor: float = 0.0

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0. The first step is above 0, and so is the last."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = self.n_steps - step
        fall = min(1.0, left / (self.decay_steps + 1))
        if self.decay == "cosine":
            fall = (1 - math.cos(math.pi * fall)) / 2
        return self.lr * warmup * (self.floor + (1 - self.floor) * fall)


@dataclass(frozen=True, kw_only=True, slots=True)
class KSchedule:
    """k goes from `start` to `end` in equal steps over the first `n_steps`, and stays there."""

    start: int
    end: int
    n_steps: int

    def at(self, step: int) -> int:
        """k of step `step`, counted from 0."""
        if step >= self.n_steps:
            return self.end
        return round(self.start + (self.end - self.start) * step / self.n_steps)
