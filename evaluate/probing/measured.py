"""A published result of this package and how it came about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ..checkpoint import Checkpoint

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Measured(Generic[ResultT]):
    """Of one run."""

    checkpoint: Checkpoint
    path: Path
    result: ResultT
    is_new: bool
    """False when it was there already."""
    replaced: tuple[str, ...] = ()
    """How an older result in the same place differed."""
