"""What the commands of `evaluate` share: their arguments, each written once, and the flags made from the settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshka.locations import expand
from matryoshka.options import with_settings

from ..config import EvaluateConfig

ROWS = ("tokens", "split", "prefix")
"""Settings that say which rows are used, and which groups."""
DRAWS = ("bootstrap", "seed")

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Runs such as data/runs/l17-k96, fleets, or checkpoint folders.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run such as data/runs/l17-k96, or a checkpoint folder.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer folder or hub name. (the one of the shard set)"), expand
]


def evaluating(
    *parts: str, reads: tuple[str, ...] = (), saves: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of what it reads: the settings of `parts`, of which the first is its own, and `reads`.

    Every command reads where the shard set and the results are, and the device; one that `saves` can be killed and go
    on. The settings file is named before the work begins.
    """
    usual = ("shards", *(name for name in ROWS if name in reads), "device", "out")
    own = tuple(type(EvaluateConfig.model_fields[parts[0]].default).model_fields) if parts else ()
    model = ("model",) if "lm" in parts else ()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def noting(given: Any, **values: Any) -> None:
            from matryoshka.terminal import note_file

            note_file(given.file)
            command(given, **values)

        return with_settings(
            EvaluateConfig,
            "evaluate",
            usual=(*usual, *model, *(own if parts != ("lm",) else ())),
            parts=parts,
            shared=(*usual, *reads, *(("save_minutes",) if saves else ())),
        )(noting)

    return decorate
