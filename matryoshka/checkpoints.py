"""What is on the disk of a run: its checkpoints, which of them is the newest, and whose weights they are.

train writes them (train/checkpoint.py); evaluate, `train export` and `Transcoder.from_pretrained` read the newest. A
folder that is still being written ends in .partial and is none.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.locations import local_path
from matryoshka.runs import CHECKPOINTS, FLEET_FILE, RUN_FILE, read_json
from matryoshka.transcoder import CONFIG_FILE, WEIGHTS_FILE

STATE_FILE = "state.json"
"""step, and whether the run was finished with it."""
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a run, or a folder with weights, holds."""

    run: Path
    """What the user named: a run, or a folder with weights."""
    folder: Path
    """Where the weights are."""
    step: int | None = None
    """Optimizer steps behind the weights; None outside a run."""
    is_finished: bool = True
    """Whether training was over and the threshold calibrated."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run.resolve().name

    @cached_property
    def sha256(self) -> str:
        """Identity of the weights: sha256 of the safetensors file."""
        with (self.folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def training_batch(self) -> int | None:
        """Rows of a batch in training; None where no run.json tells."""
        config = run_record(self.folder).get("config")
        n_rows = config.get("batch_tokens") if isinstance(config, dict) else None
        return n_rows if isinstance(n_rows, int) and not isinstance(n_rows, bool) and n_rows > 0 else None


def run_folder(folder: Path) -> Path | None:
    """The run that the weights in `folder` belong to: itself, or two above; None for bare weights."""
    folder = folder.resolve()
    runs = (folder, *([folder.parent.parent] if folder.parent.name == CHECKPOINTS else []))
    return next((run for run in runs if (run / RUN_FILE).is_file()), None)


def run_record(folder: Path) -> dict[str, Any]:
    """run.json of the run that the weights in `folder` belong to; empty for bare weights."""
    run = run_folder(folder)
    return {} if run is None else read_json(run / RUN_FILE, what="run")


def expand_fleets(runs: list[Path]) -> list[Path]:
    """`runs` with each fleet's folder replaced by the runs of its members that have a checkpoint, in their order."""
    expanded = []
    for run in runs:
        if not (run / FLEET_FILE).is_file():
            expanded.append(run)
            continue
        members = [run / str(name) for name in read_json(run / FLEET_FILE, what="fleet").get("members", [])]
        # Names come from a file: a member is directly in its fleet's folder, nowhere else.
        members = [member for member in members if member.resolve().parent == run.resolve()]
        trained = [member for member in members if any((member / CHECKPOINTS).glob("step-*"))]
        if not trained:
            raise UserError(f"no member of the fleet {run} has a checkpoint yet; let `train run` continue first")
        expanded += trained
    return expanded


def find_checkpoint(run: Path) -> Checkpoint:
    """The checkpoint that `run` means.

    A folder with weights is taken as it is. Of a run it is the checkpoint with the highest step; a folder that is
    still being written ends in .partial and is passed over. Raises UserError when there is neither.
    """
    run = local_path(run)
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give a run such as data/runs/l17-k96, or a checkpoint of one")
    if (run / WEIGHTS_FILE).is_file() and (run / CONFIG_FILE).is_file():
        return Checkpoint(run=run, folder=run)
    if not (run / RUN_FILE).is_file():
        raise UserError(
            f"{run} is neither a run (it has no {RUN_FILE}) nor a transcoder (no {WEIGHTS_FILE} with {CONFIG_FILE}); "
            "give the folder that `train run` made"
        )
    newest = newest_checkpoint(run)
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet; let `train run` reach its first one, then try again")
    return newest


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The checkpoint of a run with the highest step, if there is one."""
    steps = _folders(run)
    return _read(run, max(steps), steps[max(steps)]) if steps else None


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first."""
    return [_read(run, step, folder) for step, folder in sorted(_folders(run).items())]


def _folders(run: Path) -> dict[int, Path]:
    found = ((_STEP.fullmatch(folder.name), folder) for folder in (run / CHECKPOINTS).glob("step-*"))
    return {int(match[1]): folder for match, folder in found if match is not None and folder.is_dir()}


def _read(run: Path, step: int, folder: Path) -> Checkpoint:
    state = read_json(folder / STATE_FILE, what="checkpoint")
    return Checkpoint(run=run, folder=folder, step=step, is_finished=state.get("finished") is True)
