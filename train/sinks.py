"""Where metrics go: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from matryoshka.errors import UserError
from matryoshka.runs import METRICS_FILE, publish_bytes

TIMING_FILE = "timing.jsonl"
"""Seconds and rates. Apart from the metrics, which are the same bytes however often a run was interrupted."""


class MetricSink(Protocol):
    """Takes the numbers of one log step."""

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """`step` counts finished optimizer steps."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


class JsonlSink:
    """One JSON object a line: metrics.jsonl, and timing.jsonl beside it."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Lines after `resume_step` belong to steps that will be done again and are dropped."""
        self._files = []
        for name in (METRICS_FILE, TIMING_FILE):
            path = folder / name
            _drop_after(path, resume_step)
            self._files.append(path.open("a", encoding="utf-8"))

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Append one line to each file."""
        for file, values in zip(self._files, (metrics, timing), strict=True):
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that promises them."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


class WandbSink:
    """A Weights & Biases run with the name of the run directory; offline files lie in that directory."""

    def __init__(self, folder: Path, *, mode: str, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                mode="online" if mode == "online" else "offline",
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases could not start ({error}). Log in with `wandb login`, or use --wandb offline"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log({**metrics, **timing}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`; a kill may have left half a line or lines of lost steps."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    publish_bytes(path, b"".join(kept))
