"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
def run(
    shards: Annotated[Path | None, typer.Option(help="Folder of the shard set, such as data/l17.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run or fleet. (runs/<shard set>-k<k>, ...-fleet, beside the set)")
    ] = None,
    group_sizes: Annotated[
        str | None, typer.Option(help="Latents of each nested group, not cumulative: 1152,2304,4608. (8 x d_in in 4)")
    ] = None,
    d_sae: Annotated[str | None, typer.Option(help="Total latents; must equal the sum of --group-sizes.")] = None,
    k: Annotated[str | None, typer.Option("--k", help="Mean active latents in a row. (96)")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps. (every train row once)")] = None,
    tokens: Annotated[str | None, typer.Option(help="Rows to train on, instead of --steps, such as 15M.")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Rows in one step. (1024)")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. (4e-4)")] = None,
    input_: Annotated[
        str | None, typer.Option("--input", help="resid_mid, normalized or mlp_in. (normalized where there is a norm)")
    ] = None,
    condition: Annotated[str | None, typer.Option(help="none, centre or standardise. (centre)")] = None,
    precision: Annotated[str | None, typer.Option(help="Encoder product: auto, fp32, bf16 or fp16. (auto)")] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option(help="Steps between checkpoints. (a tenth of the run)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights. (0)")] = None,
    wandb: Annotated[str | None, typer.Option(help="off, online or offline. (off)")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="Under torchrun, spread over ranks: configs (runs), data (rows), features. (configs)"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. (auto)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with a train section. (none: only the defaults)")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="train.key=value, any setting; repeatable.")] = None,
) -> None:
    """Train one transcoder: `train run --shards data/l17`, or those of train.fleet and train.grid in --config.

    Run again to continue from the last checkpoints. SIGTERM and Ctrl-C write checkpoints before they end it.
    """
    from matryoshka.config import load_config
    from matryoshka.terminal import note_file

    from .closing import close
    from .config import TrainConfig
    from .fleet import fleet_folder, is_fleet
    from .progress import Silent, TrainDisplay
    from .ranks import Rank
    from .run import train_fleet

    flags = {
        "shards": shards,
        "out": out,
        "group_sizes": group_sizes,
        "d_sae": d_sae,
        "k": k,
        "steps": steps,
        "tokens": tokens,
        "batch_tokens": batch_tokens,
        "lr": lr,
        "input": input_,
        "condition": condition,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "wandb": wandb,
        "parallel": parallel,
        "device": device,
    }
    settings = load_config(TrainConfig, "train", file=config, overrides=set_ or (), flags=flags)
    rank = Rank.from_environment()
    if rank.index == 0:
        note_file(config)
    with TrainDisplay() if rank.index == 0 else Silent() as progress:
        result = train_fleet(settings, progress, rank)
    if rank.index == 0 or settings.parallel == "configs":
        close(result, fleet_folder(settings) if is_fleet(settings) else None, settings.shards)
    if result.stopped_by is not None:
        # What a shell reports of a process that a signal ended: whoever waits for us must not take it for finished.
        raise typer.Exit(128 + result.stopped_by)
    if any(one.outcome == "parked" for one in result.runs):
        raise typer.Exit(1)


@app.command()
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
    prefix: Annotated[int | None, typer.Option(help="Keep this many nested groups, from 1. [all]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. [data/exports/<run>-<format>]")] = None,
    n_layers: Annotated[
        int | None, typer.Option(help="Layers of the model, for circuit-tracer. [asked of the run's shard set]")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Shard set whose val rows make delphi's cache. [the run's own]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder or hub name, for neuronpedia's texts. [the one of the samples]")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository, user/repo. [not uploaded]")] = None,
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
