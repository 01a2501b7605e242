"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matryoshka.locations import expand
from matryoshka.options import Given, with_paths

from .commands.language_model import ablate, faithfulness, logits, steer
from .commands.options import DRAWS, ROWS, Run, Runs, Tokenizer, evaluating
from .config import EvaluateConfig

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
@evaluating(reads=(*ROWS, "curve_scales", "curve_tokens", *DRAWS))
def run(
    given: Given[EvaluateConfig],
    runs: Runs,
) -> None:
    """FVU, L0, cosine, dead and dense latents of each nested prefix, as a table and as RUN/eval/.../report.json."""
    from .commands.next_step import then_report
    from .commands.terminal import measure

    measure("run", runs, given.settings)
    then_report(runs, given.flags.get("shards"))


@app.command()
@evaluating("compare", reads=("tokens", "split", "batch_rows", *DRAWS), saves=False)
def compare(
    given: Given[EvaluateConfig],
    transcoders: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Two or more of: RUN, RUN@2 (its first two nested groups), or a folder that "
            "Transcoder.from_pretrained opens: Gemma Scope (1, 2), SAELens, circuit-tracer, ours.",
        ),
        expand,
    ],
) -> None:
    """FVU of transcoders of any origin at equal L0 on identical held-out rows, with 95% intervals."""
    from .analyses.compare.compare import compare, comparison_path
    from .analyses.compare.table import comparison_table
    from .commands.next_step import then_match
    from .commands.terminal import Terminal

    with Terminal() as terminal:
        result = compare(transcoders, given.settings, terminal)
    terminal.table(comparison_table(result), comparison_path(given.settings))
    then_match(transcoders, given.flags.get("shards"))


@app.command()
@evaluating("samples", reads=("tokens", "prefix", "seed"))
def samples(
    given: Given[EvaluateConfig],
    runs: Runs,
) -> None:
    """The contexts in which each latent fires most, in which it fires at all, and in which it does not."""
    from .commands.next_step import then_report
    from .commands.terminal import measure

    measure("samples", runs, given.settings)
    then_report(runs, given.flags.get("shards"))


@app.command()
@with_paths
def show(
    run: Run,
    latent: Annotated[int, typer.Argument(help="Number of the latent, from 0.")],
    shards: Annotated[str | None, typer.Option(help="Shard set, when the run has samples of several."), expand] = None,
    tokenizer: Tokenizer = None,
    top: Annotated[int | None, typer.Option(min=1, help="Only the N windows of largest activations. (all)")] = None,
) -> None:
    """Print one latent: histogram, logit tokens, parents, and its windows with the tokens shaded by activation."""
    from .commands.next_step import then_ablate
    from .report.show import show_latent

    show_latent(run, latent, shards, tokenizer, top)
    then_ablate(run, [latent], shards)


@app.command()
@evaluating(reads=("curve_scales", "curve_tokens", *DRAWS, "wandb", "wandb_project"))
def report(
    given: Given[EvaluateConfig],
    runs: Runs,
    tokenizer: Tokenizer = None,
) -> None:
    """Pages to browse a run and each of its latents, or all runs of a fleet; they open from the disk."""
    from matryoshka.checkpoints import expand_fleets

    from .commands.next_step import then_report, then_serve
    from .commands.terminal import Terminal
    from .report.build import make_report
    from .report.fleet import is_fleet, make_fleet_report
    from .report.wandb_report import log_pages

    with Terminal("report") as terminal:
        if is_fleet(runs):
            pages = make_fleet_report(runs, given.settings, progress=terminal)
        else:
            pages = make_report(runs[0], given.settings, tokenizer=tokenizer, progress=terminal)
            log_pages(pages.index.parent, given.settings)
    terminal.pages(pages)
    if is_fleet(runs):
        # Its page leads to those of the members, once they are made, and has no server.
        then_report(expand_fleets(runs)[:1], given.flags.get("shards"))
    else:
        then_serve(runs[0])


@app.command()
@evaluating("lm", saves=False)
def serve(
    given: Given[EvaluateConfig],
    run: Run,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 is any that is free. (8765, or the next free one)"),
    ] = None,
    tokenizer: Tokenizer = None,
) -> None:
    """The pages of `report` on 127.0.0.1, where you try texts, steer, and keep your notes on latents."""
    from .commands.terminal import Terminal
    from .report.serve import serve_report

    with Terminal("report") as terminal:
        served = serve_report(run, given.settings, port=port, tokenizer=tokenizer, progress=terminal)
    served.run(typer.echo)


@app.command()
@evaluating("hierarchy", reads=(*ROWS, "batch_rows", "seed"))
def hierarchy(
    given: Given[EvaluateConfig],
    runs: Runs,
) -> None:
    """Feature splitting and co-activation: which latents imply which or fire together, and what each group adds."""
    from .commands.next_step import then_report
    from .commands.terminal import measure

    measure("hierarchy", runs, given.settings)
    then_report(runs, given.flags.get("shards"))


@app.command()
@evaluating("absorption", reads=(*ROWS, *DRAWS))
def absorption(
    given: Given[EvaluateConfig],
    runs: Runs,
    tokenizer: Tokenizer = None,
) -> None:
    """Absorption (SAEBench's two scores): first-letter latents that are silent because a more specific one fires."""
    from .commands.next_step import then_report
    from .commands.terminal import measure

    measure("absorption", runs, given.settings, tokenizer=tokenizer)
    then_report(runs, given.flags.get("shards"))


@app.command()
@evaluating("probing", reads=(*ROWS, "batch_rows", "seed"))
def probing(
    given: Given[EvaluateConfig],
    runs: Runs,
    labels: Annotated[
        Path | None, typer.Option(help="JSON lines or Parquet with doc_id and label: a label set of your own.")
    ] = None,
    tokenizer: Tokenizer = None,
) -> None:
    """k-sparse probing: how well a few latents classify known labels, beside a probe on the whole input."""
    from .commands.next_step import then_report
    from .commands.terminal import measure

    measure("probing", runs, given.settings, labels=labels, tokenizer=tokenizer)
    then_report(runs, given.flags.get("shards"))


@app.command()
@evaluating(reads=("tokens", "split", "batch_rows"), saves=False)
def match(
    given: Given[EvaluateConfig],
    one: Annotated[
        str,
        typer.Argument(
            metavar="A", help="RUN, RUN@2 for its first two nested groups, or what `evaluate compare` takes."
        ),
        expand,
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="The same, of the same layer or another one."), expand],
    other_shards: Annotated[
        Path | None,
        typer.Option(help="Shard set of B, of the same text, when it is of another layer. (that of A or of B's run)"),
    ] = None,
) -> None:
    """Latent matching between two transcoders: decoder cosine (MMCS) and activation correlation."""
    from .analyses.match.match import match
    from .analyses.match.result import MATCHING_FILE
    from .analyses.match.table import matching_table
    from .commands.terminal import Terminal

    with Terminal("match") as terminal:
        matching = match(one, other, given.settings, other_shards=other_shards, progress=terminal)
    terminal.table(matching_table(matching), None if given.settings.out is None else given.settings.out / MATCHING_FILE)


@app.command()
@with_paths
def layers(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="Folder for layers.json. (it is only printed)")] = None,
) -> None:
    """The reports of runs on different shard sets, such as layers 8, 12 and 17, in one table. Measures nothing."""
    from .commands.terminal import Terminal
    from .report.layers import LAYERS_FILE, compare_layers
    from .report.layers_table import layers_table

    terminal = Terminal()
    terminal.table(layers_table(compare_layers(runs, out)), None if out is None else out / LAYERS_FILE)


MODEL_COMMANDS = [app.command()(command) for command in (faithfulness, logits, ablate, steer)]
"""Those that run the language model."""
