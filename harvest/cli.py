"""The command `harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Run a language model once and write paired activations with their tokens. Defaults are in parentheses.",
)


@app.callback()
def _harvest() -> None:
    # With a callback, typer keeps the name of a single command: `harvest run`.
    pass


@app.command()
def run(
    model: Annotated[str | None, typer.Option(help="Hub name or local folder (google/gemma-2-2b).")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Hub name, or a file, folder or glob of .txt/.jsonl/.parquet (monology/pile-uncopyrighted)."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Block of the model, from 0. Required, here or in the file.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to run through the model, such as 15M (15M).")] = None,
    ctx_len: Annotated[str | None, typer.Option(help="Tokens in one context, BOS included (1024).")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Contexts in one forward pass (8).")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32 (auto: bf16 where native).")] = None,
    codec: Annotated[str | None, typer.Option(help="compact (lossless, about 0.70 of raw) or raw (compact).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the train/val split (0).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps (auto).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the shard set (data/l<layer>).")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with a harvest section (./pipeline.yaml if there).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="harvest.key=value, any setting; repeatable.")] = None,
) -> None:
    """Harvest one layer: data/l17 from `harvest run --layer 17 --tokens 15M`. Run again to continue."""
    from matryoshka.config import find_file, load_config

    from .config import HarvestConfig
    from .progress import Screen
    from .run import harvest

    flags = {
        "model": model,
        "dataset": dataset,
        "layer": layer,
        "tokens": tokens,
        "ctx_len": ctx_len,
        "batch_size": batch_size,
        "dtype": dtype,
        "codec": codec,
        "seed": seed,
        "device": device,
        "out": out,
    }
    settings = load_config(HarvestConfig, "harvest", file=find_file(config), overrides=set_ or (), flags=flags)
    with Screen() as screen:
        result = harvest(settings, screen)
    screen.report(result)
