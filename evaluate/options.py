"""Options that several commands of `evaluate` share, each written once, and the settings they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .config import EvaluateConfig

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Runs such as data/runs/l17-k96, fleets, or checkpoint folders.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run such as data/runs/l17-k96, or a checkpoint folder.")]
Shards = Annotated[
    Path | None, typer.Option("--shards", help="Shard set to measure on. (the one that the run was trained on)")
]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Val rows to use, such as 200k. (all of them)")]
Split = Annotated[
    str | None,
    typer.Option("--split", help="val, or train to see what was memorised; only on request. (val)"),
]
Prefix = Annotated[int | None, typer.Option("--prefix", help="The first N nested groups alone, from 1. (all of them)")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps. (auto)")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer folder or hub name. (the one of the shard set)")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with an evaluate section. (none: only the defaults)")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="evaluate.key=value, any setting; repeatable.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name of the language model. (what the shard set names)")
]


def lm_overrides(model: str | None) -> list[str]:
    """What --model sets."""
    from json import dumps

    # As a JSON string, which is YAML too: a folder may be called 123 or off.
    return [] if model is None else [f"evaluate.lm.model={dumps(model)}"]


def read_settings(file: Path | None, overrides: Sequence[str], flags: Mapping[str, Any]) -> EvaluateConfig:
    """The settings of a command: its flags over its --set options over the file. Raises UserError."""
    from matryoshka.config import load_config
    from matryoshka.terminal import note_file

    from .config import EvaluateConfig

    settings = load_config(EvaluateConfig, "evaluate", file=file, overrides=overrides, flags=flags)
    note_file(file)
    return settings
