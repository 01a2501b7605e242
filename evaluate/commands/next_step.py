"""What usually comes after a command of `evaluate`, ready to be pasted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matryoshka.terminal import next_command

TOGETHER = "together"
"""Folder beside several runs for the page that shows them."""


def then_report(runs: Sequence[Path], shards: Path | str | None) -> None:
    """After numbers were made of `runs`: the pages that show them."""
    where = () if shards is None else ("--shards", shards)
    several = ()
    if len(runs) > 1:
        parent = Path(os.path.commonpath([run.parent for run in runs]))
        several = ("--out", parent / TOGETHER)
    next_command("evaluate", "report", *runs, *where, *several)


def then_serve(run: Path) -> None:
    """After the pages of a run were made."""
    next_command("evaluate", "serve", run)


def then_match(transcoders: Sequence[str], shards: Path | str | None) -> None:
    """After the numbers of two transcoders were compared: their latents."""
    where = () if shards is None else ("--shards", shards)
    next_command("evaluate", "match", *transcoders[:2], *where)


def then_ablate(run: Path, latents: Sequence[int], shards: Path | str | None) -> None:
    """After a latent was looked at: what the language model does without it."""
    where = () if shards is None else ("--shards", shards)
    next_command("evaluate", "ablate", run, *map(str, latents), *where)


def then_steer(run: Path, latent: int, shards: Path | str | None) -> None:
    """After a latent was taken out: put more of it in."""
    where = () if shards is None else ("--shards", shards)
    next_command("evaluate", "steer", run, str(latent), "--text", "The", *where)


def then_show(run: Path, latent: int) -> None:
    """After steering: where the latent fires by itself."""
    next_command("evaluate", "show", run, str(latent))
