"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Runs such as data/runs/l17-k96, or checkpoint folders.")
    ],
    shards: Annotated[
        Path | None, typer.Option(help="Shard set whose val split is used. Required here or in the file.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Val rows to use, such as 200k. (all of them)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. (auto)")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. (RUN/eval/<shard set>-<digest>)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an evaluate section. (./pipeline.yaml if there)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="evaluate.key=value, any setting; repeatable.")
    ] = None,
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
    shards: Annotated[
        Path | None, typer.Option(help="Shard set whose val split is used. Required here or in the file.")
    ] = None,
    l0: Annotated[
        list[float] | None, typer.Option(help="L0 to compare at; repeatable. (that of the first at its threshold)")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Val rows to use, such as 200k. (all of them)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. (auto)")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.json. (it is only printed)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an evaluate section. (./pipeline.yaml if there)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="evaluate.key=value, any setting; repeatable.")
    ] = None,
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
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Runs such as data/runs/l17-k96.")],
    shards: Annotated[
        Path | None, typer.Option(help="Shard set whose val split is used. Required here or in the file.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Rows to choose from, such as 1M. (all of them)")] = None,
    split: Annotated[str | None, typer.Option(help="val or train. (val)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. (auto)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an evaluate section. (./pipeline.yaml if there)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="evaluate.samples.key=value, any setting; repeatable.")
    ] = None,
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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run that has samples.")],
    latent: Annotated[int, typer.Argument(help="Number of the latent, from 0.")],
    shards: Annotated[str | None, typer.Option(help="Shard set, when the run has samples of several.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder or hub name. (the one of the shard set)")
    ] = None,
) -> None:
    """Print one latent: its histogram, and its windows with the tokens shaded by activation."""
    from .show import show_latent

    show_latent(run, latent, shards, tokenizer)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run such as data/runs/l17-k96.")],
    shards: Annotated[
        Path | None, typer.Option(help="Shard set; numbers and samples are made from it where they are missing.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder or hub name. (the one of the shard set)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. (auto)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with an evaluate section. (./pipeline.yaml if there)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="evaluate.key=value, any setting; repeatable.")
    ] = None,
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
