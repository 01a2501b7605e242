"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import ConfigFile, Device, Overrides, Run, Runs, Shards, Tokenizer, Tokens

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Measure transcoders on the held-out rows of a shard set. No language model is run.",
)


@app.callback()
def _evaluate() -> None:
    # With a callback, typer keeps the name of a single command: `evaluate run`.
    pass


@app.command()
def run(
    runs: Runs,
    shards: Shards = None,
    tokens: Tokens = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. (RUN/eval/<shard set>-<digest>)")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """FVU, L0, cosine, dead and dense latents of each nested prefix, as a table and as RUN/eval/.../report.json."""
    from matryoshka.config import find_file, load_config

    from .config import EvaluateConfig
    from .run import evaluate
    from .screen import Screen

    flags = {"shards": shards, "tokens": tokens, "device": device, "out": out}
    settings = load_config(EvaluateConfig, "evaluate", file=find_file(config), overrides=set_ or (), flags=flags)
    with Screen() as screen:
        evaluations = evaluate(runs, settings, screen)
    screen.report(evaluations)


@app.command()
def compare(
    transcoders: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Two or more of: RUN, RUN@PREFIX, gemma-scope:PATH, a Gemma Scope 2 folder, a SAELens folder.",
        ),
    ],
    shards: Shards = None,
    l0: Annotated[
        list[float] | None, typer.Option(help="L0 to compare at; repeatable. (that of the first at its threshold)")
    ] = None,
    tokens: Tokens = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.json. (it is only printed)")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """FVU of transcoders of any origin at equal L0 on identical held-out rows, with 95% intervals."""
    from matryoshka.config import find_file, load_config

    from .compare import compare, comparison_path
    from .compare_screen import comparison_table
    from .config import EvaluateConfig
    from .screen import Screen

    overrides = [*(set_ or ()), *([f"evaluate.compare.l0={l0}"] if l0 else ())]
    flags = {"shards": shards, "tokens": tokens, "device": device, "out": out}
    settings = load_config(EvaluateConfig, "evaluate", file=find_file(config), overrides=overrides, flags=flags)
    with Screen() as screen:
        result = compare(transcoders, settings, screen)
    screen.table(comparison_table(result), comparison_path(settings))


@app.command()
def samples(
    runs: Runs,
    shards: Shards = None,
    tokens: Tokens = None,
    split: Annotated[str | None, typer.Option(help="val or train. (val)")] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """The contexts in which each latent fires most, in which it fires at all, and in which it does not."""
    from matryoshka.config import find_file, load_config

    from .config import EvaluateConfig
    from .samples import make_samples
    from .screen import Screen

    overrides = [*(set_ or ()), *([f"evaluate.samples.split={split}"] if split else ())]
    flags = {"shards": shards, "tokens": tokens, "device": device}
    settings = load_config(EvaluateConfig, "evaluate", file=find_file(config), overrides=overrides, flags=flags)
    for path in runs:
        with Screen("samples") as screen:
            sampled = make_samples(path, settings, screen)
        screen.sampled(sampled)


@app.command()
def show(
    run: Run,
    latent: Annotated[int, typer.Argument(help="Number of the latent, from 0.")],
    shards: Annotated[str | None, typer.Option(help="Shard set, when the run has samples of several.")] = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Print one latent: its histogram, and its windows with the tokens shaded by activation."""
    from .show import show_latent

    show_latent(run, latent, shards, tokenizer)


@app.command()
def report(
    run: Run,
    shards: Annotated[
        Path | None, typer.Option(help="Shard set; numbers and samples are made from it where they are missing.")
    ] = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """One folder of pages to look at a run and each of its latents; opens from the disk, no server needed."""
    from matryoshka.config import find_file, load_config

    from .config import EvaluateConfig
    from .report.build import make_report
    from .screen import Screen

    flags = {"shards": shards, "device": device}
    settings = load_config(EvaluateConfig, "evaluate", file=find_file(config), overrides=set_ or (), flags=flags)
    with Screen("report") as screen:
        pages = make_report(run, settings, tokenizer=tokenizer, progress=screen)
    screen.pages(pages)
