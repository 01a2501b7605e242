"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matryoshka.locations import expand
from matryoshka.options import Given, with_paths, with_settings

from .config import TrainConfig

USUAL = (
    *("shards", "out", "group_sizes", "d_sae", "k", "steps", "tokens", "batch_tokens", "lr", "input", "condition"),
    *("precision", "checkpoint_every", "seed", "wandb", "parallel", "device"),
)
"""What the help shows first."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train Matryoshka transcoders on a shard set, without the language model.",
)


@app.callback()
def _train() -> None:
    # With a callback, typer keeps the name of a single command: `train run`.
    pass


@app.command()
@with_settings(TrainConfig, "train", usual=USUAL)
def run(given: Given[TrainConfig]) -> None:
    """Train one transcoder: `train run --shards data/l17`, or those of train.fleet and train.grid in --config.

    Run again to continue from the last checkpoints. SIGTERM and Ctrl-C write checkpoints before they end it.
    """
    from matryoshka.ranks import Rank
    from matryoshka.terminal import note_file

    from .closing import close
    from .fleet import fleet_folder, is_fleet
    from .progress import NoProgress, TrainDisplay
    from .run import train_fleet

    settings, rank = given.settings, Rank.from_environment()
    if rank.index == 0:
        note_file(given.file)
    with TrainDisplay() if rank.index == 0 else NoProgress() as progress:
        result = train_fleet(settings, progress, rank)
    if rank.index == 0 or settings.parallel == "configs":
        close(result, fleet_folder(settings) if is_fleet(settings) else None, settings.shards)
    if result.stopped_by is not None:
        # What a shell reports of a process that a signal ended: whoever waits for us must not take it for finished.
        raise typer.Exit(128 + result.stopped_by)
    if any(one.outcome == "diverged" for one in result.runs):
        raise typer.Exit(1)


@app.command()
@with_paths
def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="A run such as data/runs/l17-k96, or a checkpoint. circuit-tracer: one for each layer."
        ),
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="saelens, circuit-tracer, gemma-scope, gemma-scope-2, delphi, neuronpedia or native."
        ),
    ],
    prefix: Annotated[int | None, typer.Option(help="Keep this many nested groups, from 1. (all)")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. (data/exports/<run>-<format>)")] = None,
    n_layers: Annotated[
        int | None, typer.Option(help="Layers of the model, for circuit-tracer. (asked of the run's shard set)")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Shard set whose val rows make delphi's cache. (the run's own)")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or hub name, for neuronpedia's texts. (the one of the samples)"),
        expand,
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository, user/repo. (not uploaded)")] = None,
) -> None:
    """Write a trained transcoder, or a nested prefix of it, in a format that other tools open."""
    from .export import export_runs

    exported = export_runs(runs, form, prefix=prefix, out=out, n_layers=n_layers, shards=shards, tokenizer=tokenizer)
    typer.echo(f"{exported.folder} {'is there already' if exported.already_there else 'written'}")
    for lost in exported.dropped:
        typer.echo(f"not in it: {lost}")
    if push is not None:
        from matryoshka.interop.hub import upload

        typer.echo(upload(exported.folder, push, message=f"Matryoshka transcoder, {form}"))
