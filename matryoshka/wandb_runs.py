"""Weights & Biases: the start of a run, and folders as artifacts (a transcoder, the pages of a report)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError

_UNFIT = re.compile(r"[^\w.-]")
"""Everything that the name of an artifact cannot hold."""


def start_run(*, project: str, name: str, folder: Path, mode: str, offline: str, **options: Any) -> Any:
    """A W&B run whose own files are in `folder`; several may be open at the same time.

    Args:
        mode: online or offline.
        offline: the option that makes it offline, for the message.
        options: more arguments of `wandb.init`.

    Raises:
        UserError: W&B cannot start.
    """
    import wandb

    try:
        return wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            mode="online" if mode == "online" else "offline",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
            **options,
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases could not start ({error}). Log in with `wandb login`, or use {offline}; what is on the "
            "disk is whole without it"
        ) from error


def check_login(offline: str) -> None:
    """Raise UserError, which names the option `offline`, unless this machine is logged in: asked before anything is
    written."""
    import wandb

    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases could not start ({error}). Log in with `wandb login`, or use {offline}; nothing was "
            "written"
        ) from error


def log_folder(
    run: Any, folder: Path, *, name: str, kind: str, files: tuple[str, ...] | None = None, metadata: Mapping[str, Any]
) -> None:
    """Log `folder` as an artifact of an open W&B run; equal content makes no new version.

    Args:
        run: what `wandb.init` returned.
        name, kind: of the artifact, as the W&B page lists it: `l17-k96-transcoder`, `model`.
        files: names below `folder` to take; all by default.
        metadata: shown beside the artifact.
    """
    import wandb

    artifact = wandb.Artifact(_UNFIT.sub("-", name), type=kind, metadata=dict(metadata))
    if files is None:
        artifact.add_dir(str(folder))
    else:
        for file in files:
            artifact.add_file(str(folder / file), name=file)
    run.log_artifact(artifact)


def log_report(
    pages: Path, *, mode: str, project: str, name: str, metadata: Mapping[str, Any], summary: Mapping[str, float]
) -> None:
    """A W&B run of type `report` in `project` that holds the pages as an artifact, and `summary` as its numbers.

    `mode`: online or offline. Raises UserError when W&B cannot start.
    """
    run = start_run(
        project=project,
        name=f"{name}-report",
        folder=pages.parent,
        mode=mode,
        offline="--set evaluate.wandb=offline",
        job_type="report",
    )
    run.summary.update(dict(summary))
    log_folder(run, pages, name=f"{name}-report", kind="report", metadata=metadata)
    run.finish()
