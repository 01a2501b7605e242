"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .intervention.commands import ablate, faithfulness, logits, steer
from .options import (
    ConfigFile,
    Device,
    Model,
    Overrides,
    Prefix,
    Run,
    Runs,
    Shards,
    Split,
    Tokenizer,
    Tokens,
    lm_overrides,
    read_settings,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Measure transcoders on the held-out rows of a shard set. The language model is run by faithfulness, logits, "
    "ablate and steer alone.",
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
    split: Split = None,
    prefix: Prefix = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. (RUN/eval/<shard set>-<digest>)")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """FVU, L0, cosine, dead and dense latents of each nested prefix, as a table and as RUN/eval/.../report.json."""
    from .next_step import then_report
    from .screen import measure

    flags = {"shards": shards, "tokens": tokens, "split": split, "prefix": prefix, "device": device, "out": out}
    settings = read_settings(config, set_ or (), flags)
    measure("run", runs, settings)
    then_report(runs, shards)


@app.command()
def compare(
    transcoders: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Two or more of: RUN, RUN@2 (its first two nested groups), or a folder that "
            "Transcoder.from_pretrained opens: Gemma Scope (1, 2), SAELens, circuit-tracer, ours.",
        ),
    ],
    shards: Shards = None,
    l0: Annotated[
        list[float] | None, typer.Option(help="L0 to compare at; repeatable. (that of the first at its threshold)")
    ] = None,
    tokens: Tokens = None,
    split: Split = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.json. (it is only printed)")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """FVU of transcoders of any origin at equal L0 on identical held-out rows, with 95% intervals."""
    from .compare import compare, comparison_path
    from .compare_screen import comparison_table
    from .next_step import then_match
    from .screen import Screen

    overrides = [*(set_ or ()), *([f"evaluate.compare.l0={l0}"] if l0 else ())]
    flags = {"shards": shards, "tokens": tokens, "split": split, "device": device, "out": out}
    settings = read_settings(config, overrides, flags)
    with Screen() as screen:
        result = compare(transcoders, settings, screen)
    screen.table(comparison_table(result), comparison_path(settings))
    then_match(transcoders, shards)


@app.command()
def samples(
    runs: Runs,
    shards: Shards = None,
    tokens: Tokens = None,
    split: Split = None,
    prefix: Prefix = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """The contexts in which each latent fires most, in which it fires at all, and in which it does not."""
    from .next_step import then_report
    from .screen import measure

    overrides = [*(set_ or ()), *([f"evaluate.samples.split={split}"] if split else ())]
    flags = {"shards": shards, "tokens": tokens, "prefix": prefix, "device": device}
    settings = read_settings(config, overrides, flags)
    measure("samples", runs, settings)
    then_report(runs, shards)


@app.command()
def show(
    run: Run,
    latent: Annotated[int, typer.Argument(help="Number of the latent, from 0.")],
    shards: Annotated[str | None, typer.Option(help="Shard set, when the run has samples of several.")] = None,
    tokenizer: Tokenizer = None,
    top: Annotated[int | None, typer.Option(min=1, help="Only the N windows of largest activations. (all)")] = None,
) -> None:
    """Print one latent: histogram, logit tokens, parents, and its windows with the tokens shaded by activation."""
    from .next_step import then_ablate
    from .show import show_latent

    show_latent(run, latent, shards, tokenizer, top)
    then_ablate(run, [latent], None if shards is None else Path(shards))


@app.command()
def report(
    runs: Runs,
    shards: Annotated[
        Path | None,
        typer.Option(help="Shard set; numbers and samples that are missing are made from it. (that of the run)"),
    ] = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report/; needed for several runs. (RUN/eval/<shard set>-<digest>)")
    ] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Pages to browse a run and each of its latents, or all runs of a fleet; they open from the disk."""
    from .checkpoint import expand_fleets
    from .next_step import then_report, then_serve
    from .report.build import make_report
    from .report.fleet import is_fleet, make_fleet_report
    from .screen import Screen
    from .wandb_report import log_pages

    flags = {"shards": shards, "device": device, "out": out}
    settings = read_settings(config, set_ or (), flags)
    with Screen("report") as screen:
        if is_fleet(runs):
            pages = make_fleet_report(runs, settings, progress=screen)
        else:
            pages = make_report(runs[0], settings, tokenizer=tokenizer, progress=screen)
            log_pages(pages.index.parent, settings)
    screen.pages(pages)
    if is_fleet(runs):
        # Its page leads to those of the members, once they are made, and has no server.
        then_report(expand_fleets(runs)[:1], shards)
    else:
        then_serve(runs[0])


@app.command()
def serve(
    run: Run,
    shards: Annotated[
        Path | None, typer.Option(help="Shard set; names the language model. (the one that the run was trained on)")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 is any that is free. (8765, or the next free one)"),
    ] = None,
    tokenizer: Tokenizer = None,
    model: Model = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """The pages of `report` on 127.0.0.1, where you try texts, steer, and keep your notes on latents."""
    from .report.serve import serve_report
    from .screen import Screen

    flags = {"shards": shards, "device": device}
    settings = read_settings(config, [*(set_ or ()), *lm_overrides(model)], flags)
    with Screen("report") as screen:
        served = serve_report(run, settings, port=port, tokenizer=tokenizer, progress=screen)
    served.run(typer.echo)


@app.command()
def hierarchy(
    runs: Runs,
    shards: Shards = None,
    tokens: Tokens = None,
    split: Split = None,
    prefix: Prefix = None,
    clusters: Annotated[
        bool | None, typer.Option("--clusters/--no-clusters", help="Lay out and cluster decoder directions. (do)")
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Feature splitting and co-activation: which latents imply which or fire together, and what each group adds."""
    from .next_step import then_report
    from .screen import measure

    overrides = [*(set_ or ()), *([] if clusters is None else [f"evaluate.hierarchy.clusters={str(clusters).lower()}"])]
    flags = {"shards": shards, "tokens": tokens, "split": split, "prefix": prefix, "device": device}
    settings = read_settings(config, overrides, flags)
    measure("hierarchy", runs, settings)
    then_report(runs, shards)


@app.command()
def absorption(
    runs: Runs,
    shards: Shards = None,
    tokens: Tokens = None,
    split: Split = None,
    prefix: Prefix = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Absorption (SAEBench's two scores): first-letter latents that are silent because a more specific one fires."""
    from .next_step import then_report
    from .screen import measure

    flags = {"shards": shards, "tokens": tokens, "split": split, "prefix": prefix, "device": device}
    settings = read_settings(config, set_ or (), flags)
    measure("absorption", runs, settings, tokenizer=tokenizer)
    then_report(runs, shards)


@app.command()
def probing(
    runs: Runs,
    shards: Shards = None,
    labels: Annotated[
        Path | None, typer.Option(help="JSON lines or Parquet with doc_id and label: a label set of your own.")
    ] = None,
    tokens: Tokens = None,
    split: Split = None,
    prefix: Prefix = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """k-sparse probing: how well a few latents classify known labels, beside a probe on the whole input."""
    from .next_step import then_report
    from .screen import measure

    flags = {"shards": shards, "tokens": tokens, "split": split, "prefix": prefix, "device": device}
    settings = read_settings(config, set_ or (), flags)
    measure("probing", runs, settings, labels=labels, tokenizer=tokenizer)
    then_report(runs, shards)


@app.command()
def match(
    one: Annotated[
        str,
        typer.Argument(
            metavar="A", help="RUN, RUN@2 for its first two nested groups, or what `evaluate compare` takes."
        ),
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="The same, of the same layer or another one.")],
    shards: Shards = None,
    other_shards: Annotated[
        Path | None,
        typer.Option(help="Shard set of B, of the same text, when it is of another layer. (that of A or of B's run)"),
    ] = None,
    tokens: Tokens = None,
    split: Split = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for matching.json and matches.parquet. (printed only)")
    ] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Latent matching between two transcoders: decoder cosine (MMCS) and activation correlation."""
    from .screen import Screen
    from .structure.matching import match
    from .structure.matching_file import MATCHING_FILE
    from .structure.relations_screen import matching_table

    flags = {"shards": shards, "tokens": tokens, "split": split, "device": device, "out": out}
    settings = read_settings(config, set_ or (), flags)
    with Screen("match") as screen:
        matching = match(one, other, settings, other_shards=other_shards, progress=screen)
    screen.table(matching_table(matching), None if settings.out is None else settings.out / MATCHING_FILE)


@app.command()
def layers(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="Folder for layers.json. (it is only printed)")] = None,
) -> None:
    """The reports of runs on different shard sets, such as layers 8, 12 and 17, in one table. Measures nothing."""
    from .screen import Screen
    from .structure.layers import LAYERS_FILE, compare_layers
    from .structure.relations_screen import layers_table

    screen = Screen()
    screen.table(layers_table(compare_layers(runs, out)), None if out is None else out / LAYERS_FILE)


MODEL_COMMANDS = [app.command()(command) for command in (faithfulness, logits, ablate, steer)]
"""Those that run the language model."""
