"""The command `harvest`."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from matryoshka.locations import location
from matryoshka.options import Given, flag, with_paths, with_settings

from .config import HarvestConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Run a language model once and write paired activations with their tokens. Defaults are in parentheses.",
)

USUAL = (
    *("model", "dataset", "layer", "layers", "source", "target", "tokens", "ctx_len", "codec", "out", "batch_size"),
    "device",
)
"""What the help shows first."""

Folder = Annotated[
    Any, typer.Argument(help="Folder or URL of a shard set, such as data/l17 or s3://bucket/l17."), location
]


@app.callback()
def _harvest() -> None:
    # With a callback, typer keeps the names of the commands.
    pass


@app.command()
@with_settings(HarvestConfig, "harvest", usual=USUAL)
def run(given: Given[HarvestConfig]) -> None:
    """Harvest one layer: data/l17 from `harvest run --layer 17 --tokens 15M`. Run again to continue.

    Several at once: --layers 8,12,17. Several processes: torchrun --nproc-per-node 4 -m harvest run ...
    """
    from matryoshka.ranks import Rank
    from matryoshka.terminal import note, note_file

    from .closing import close
    from .progress import HarvestDisplay
    from .run import harvest
    from .text_files import describe_files, local_files

    is_first = Rank.from_environment().is_first
    if is_first and (files := local_files(given.settings.dataset)) is not None:
        note(describe_files(given.settings.dataset, files))
    if is_first:
        note_file(given.file)
    with HarvestDisplay() as display:
        results = harvest(given.settings, display)
    if is_first:
        close(results, given.file)


@app.command()
@with_settings(HarvestConfig, "harvest", usual=USUAL)
def plan(given: Given[HarvestConfig]) -> None:
    """Say what `harvest run` with the same options would need: disk and, after a warm-up, time. Writes nothing."""
    from matryoshka.terminal import next_command, note, result

    from .progress import describe
    from .run import plan as estimate_of

    result(describe(estimate_of(given.settings, functools.partial(note, warning=True))))
    next_command("harvest", "run", *given.words())


@app.command()
@with_paths
def info(folder: Folder) -> None:
    """Show what a finished shard set holds: model, sites, sizes, norms, sinks."""
    from matryoshka.tables import FactTable
    from matryoshka.terminal import next_command, show

    from .info import describe

    show(FactTable(str(folder), describe(folder)))
    next_command("train", "run", "--shards", folder)


@app.command()
@with_paths
def verify(
    folder: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Harvest the bad shards again.")] = False,
    batch_size: Annotated[str | None, flag(HarvestConfig, "batch_size")] = None,
    device: Annotated[str | None, flag(HarvestConfig, "device")] = None,
) -> None:
    """Read a whole shard set and name every shard that is damaged. Ends with exit code 1 when there is one."""
    from matryoshka.terminal import next_command, result

    from .repair import verify_and_repair

    operational: dict[str, Any] = {"batch_size": batch_size, "device": device}
    operational = {name: value for name, value in operational.items() if value is not None}
    whole = verify_and_repair(folder, operational, repair=repair, say=result)
    if not whole:
        next_command("harvest", "verify", folder, "--repair")
        raise typer.Exit(1)
