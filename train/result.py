"""What training leaves behind."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from .member import Outcome


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind."""

    path: Path
    checkpoint: Path | None
    """The last one; None when the run diverged before its first."""
    n_steps: int
    n_steps_taken: int
    """0 when an earlier command had finished the run."""
    outcome: Outcome = "finished"
    reason: str = ""
    """Why a run diverged or stopped."""


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What a command leaves behind."""

    runs: tuple[TrainResult, ...]
    stopped_by: signal.Signals | None
    """The signal that ended the command early, if one did."""
