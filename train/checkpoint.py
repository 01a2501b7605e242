"""Checkpoints: checkpoints/step-NNNNNN/{transcoder.safetensors, config.json, optimizer.safetensors, state.json}.

The transcoder in it is folded and usable as it stands; optimizer.safetensors holds the exact state of the training
step, from which a run goes on bit for bit. A folder without the suffix .partial is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor

from matryoshka.checkpoints import STATE_FILE, list_checkpoints
from matryoshka.errors import UserError
from matryoshka.runs import CHECKPOINTS, FORMAT_VERSION, fsync_path, publish_json
from matryoshka.transcoder import Transcoder

from .distributed.latent_slice import LatentSlice, is_by_latent

OPTIMIZER_FILE = "optimizer.safetensors"


def saved_state(folder: Path, held: LatentSlice | None = None) -> dict[str, Tensor]:
    """The state of the training step in a checkpoint, for StepState.load_tensors; with `held` one rank's latents."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if held is None:
            return load_file(folder / OPTIMIZER_FILE)
        with safe_open(folder / OPTIMIZER_FILE, "pt") as file:
            names = file.keys()
            # One tensor at a time: the whole state need not fit.
            return {
                name: held.part(file.get_tensor(name)) if is_by_latent(name) else file.get_tensor(name)
                for name in names
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read ({error}); delete that folder to continue from the one before"
        ) from error


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], transcoder: Transcoder, *, finished: bool
) -> None:
    """Write a checkpoint aside and publish it by renaming; one of the same step is replaced."""
    from safetensors.torch import save_file

    folder = run / CHECKPOINTS / f"step-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    transcoder.save(partial)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / OPTIMIZER_FILE)
    fsync_path(partial / OPTIMIZER_FILE)
    publish_json(partial / STATE_FILE, {"format_version": FORMAT_VERSION, "step": step, "finished": finished})
    if folder.exists():
        _discard(folder)
    os.replace(partial, folder)
    fsync_path(folder.parent)


def prune_checkpoints(run: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and those at multiples of `keep_every` steps.

    What a kill left half-written goes too.
    """
    for checkpoint in list_checkpoints(run)[:-keep]:
        if keep_every is None or (checkpoint.step or 0) % keep_every:
            _discard(checkpoint.folder)
    for partial in (run / CHECKPOINTS).glob("*.partial"):
        shutil.rmtree(partial)


def _discard(folder: Path) -> None:
    """Delete a checkpoint. Renamed first: a kill in the middle must not leave a folder that looks whole."""
    doomed = folder.with_name(folder.name + ".old.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
