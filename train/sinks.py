"""Where metrics go: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from matryoshka.runs import METRICS_FILE, TIMING_FILE, publish_bytes
from matryoshka.transcoder import CONFIG_FILE, WEIGHTS_FILE
from matryoshka.wandb_runs import log_folder, start_run

WANDB_ID_FILE = "wandb-id.txt"


class MetricSink(Protocol):
    """Takes the numbers of one log step."""

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """`step` counts finished optimizer steps."""
        ...

    def close(self, finished: Path | None = None) -> None:
        """Write out what is held back. `finished`: the folder of the last checkpoint of a run that is done."""
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

    def close(self, finished: Path | None = None) -> None:  # noqa: ARG002 -- the checkpoint is beside the files
        """Close the files."""
        for file in self._files:
            file.close()


class WandbSink:
    """A Weights & Biases run with the name of the run directory; offline files are in that directory."""

    def __init__(
        self, folder: Path, *, mode: str, project: str, config: Mapping[str, Any], group: str | None = None
    ) -> None:
        """`group` shows the runs of a fleet together. A run that goes on keeps its id, and so its curves online."""
        online = mode == "online"
        self._uploads = online
        self._folder = folder
        self._run = start_run(
            project=project,
            name=folder.name,
            folder=folder,
            mode=mode,
            offline="--wandb offline",
            group=group,
            id=_wandb_id(folder),
            resume="allow" if online else None,
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log({**wandb_metrics(metrics), **timing}, step=step)

    def close(self, finished: Path | None = None) -> None:
        """Finish the run; online, the transcoder of a finished one becomes its artifact."""
        if finished is not None and self._uploads:
            log_folder(
                self._run,
                finished,
                name=f"{self._folder.name}-transcoder",
                kind="model",
                # Not the optimizer's state: it is twice as large, and a run is resumed where it is.
                files=(CONFIG_FILE, WEIGHTS_FILE),
                metadata={"checkpoint": finished.name},
            )
        self._run.finish()


def wandb_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A line of metrics.jsonl under the names that dashboards of sparse dictionaries have, with its own beside them."""
    groups = [value for name, value in metrics.items() if name.startswith("fvu/prefix_")]
    named = dict(metrics)
    for name, value in (
        ("l0_norm", metrics.get("l0")),
        ("learning_rate", metrics.get("lr")),
        ("dead_features_percentage", 100 * metrics["dead_share"] if "dead_share" in metrics else None),
        ("group_fvu_min", min(groups, default=None)),
        ("group_fvu_mean", sum(groups) / len(groups) if groups else None),
        ("group_fvu_max", max(groups, default=None)),
    ):
        if value is not None:
            named[name] = value
    return named


def _wandb_id(folder: Path) -> str:
    """The id that the run in `folder` has had from its first start on."""
    path = folder / WANDB_ID_FILE
    if not path.exists():
        publish_bytes(path, uuid.uuid4().hex[:12].encode())
    return path.read_text(encoding="utf-8").strip()


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
