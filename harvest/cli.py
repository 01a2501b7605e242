"""The command `harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Run a language model once and write paired activations with their tokens. Defaults are in parentheses.",
)

Model = Annotated[str | None, typer.Option(help="Hub name or local folder (google/gemma-2-2b).")]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Hub name, or a file, folder or glob of .txt/.jsonl (also .gz, .zst) or .parquet "
        "(monology/pile-uncopyrighted)."
    ),
]
Layer = Annotated[int | None, typer.Option(help="Block of the model, from 0. Required, here or in the file.")]
Layers = Annotated[
    str | None, typer.Option(help="Several blocks from one pass, such as 8,12,17 or 0-25: a set for each.")
]
Source = Annotated[
    str | None, typer.Option(help="Site to read, such as resid_pre, or 8:resid_mid with its layer (resid_mid).")
]
TargetSite = Annotated[
    str | None, typer.Option(help="Site to predict, such as attn_out, or 9:mlp_out with its layer (mlp_out).")
]
Tokens = Annotated[
    str | None, typer.Option(help="Tokens to run through the model, such as 15M; more let a set grow (15M).")
]
CtxLen = Annotated[str | None, typer.Option(help="Tokens in one context, BOS included (1024).")]
Bos = Annotated[str | None, typer.Option(help="First token of a context: auto, none or a token id (auto).")]
Pack = Annotated[
    bool | None, typer.Option("--pack/--no-pack", help="Documents end to end, or each in contexts of its own (pack).")
]
ValUnit = Annotated[
    str | None,
    typer.Option(help="What is held out: each document whole, or block: parts of documents (document)."),
]
MaxDocTokens = Annotated[str | None, typer.Option(help="Tokens of a document beyond these are left out (all).")]
Dedup = Annotated[bool | None, typer.Option("--dedup/--no-dedup", help="Leave out documents that repeat (no-dedup).")]
SkipBadLines = Annotated[
    bool | None,
    typer.Option("--skip-bad-lines/--no-skip-bad-lines", help="Leave out and count broken jsonl lines (no-skip)."),
]
BatchSize = Annotated[str | None, typer.Option(help="Contexts in one forward pass, or auto: the fastest (8).")]
Dtype = Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32 (auto: bf16 where native).")]
Codec = Annotated[
    str | None,
    typer.Option(help="compact (lossless, about 0.70 of raw), raw, or int8 (lossy, about 0.50) (compact)."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the train/val split (0).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps (auto).")]
Out = Annotated[
    str | None,
    typer.Option(
        help="Folder or URL (s3://bucket/l17) of the shard set; of several sets their parent, or x/l{layer} "
        "(data/l<layer>)."
    ),
]
File = Annotated[Path | None, typer.Option(help="YAML with a harvest section (none: only the defaults).")]
Set = Annotated[list[str] | None, typer.Option("--set", help="harvest.key=value, any setting; repeatable.")]
Folder = Annotated[str, typer.Argument(help="Folder or URL of a shard set, such as data/l17 or s3://bucket/l17.")]


@app.callback()
def _harvest() -> None:
    # With a callback, typer keeps the names of the commands.
    pass


@app.command()
def run(
    model: Model = None,
    dataset: Dataset = None,
    layer: Layer = None,
    layers: Layers = None,
    source: Source = None,
    target: TargetSite = None,
    tokens: Tokens = None,
    ctx_len: CtxLen = None,
    bos: Bos = None,
    pack: Pack = None,
    val_unit: ValUnit = None,
    max_doc_tokens: MaxDocTokens = None,
    dedup: Dedup = None,
    skip_bad_lines: SkipBadLines = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    codec: Codec = None,
    seed: Seed = None,
    device: Device = None,
    out: Out = None,
    config: File = None,
    set_: Set = None,
) -> None:
    """Harvest one layer: data/l17 from `harvest run --layer 17 --tokens 15M`. Run again to continue.

    Several at once: --layers 8,12,17. Several processes: torchrun --nproc-per-node 4 -m harvest run ...
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "set_")}
    settings = _settings(config, set_, flags)
    from matryoshka.terminal import note, note_file

    from .closing import close
    from .progress import HarvestDisplay
    from .ranks import Ranks
    from .run import harvest
    from .text_files import describe_files, local_files

    is_first = Ranks.from_environment().is_first
    if is_first and (files := local_files(settings.dataset)) is not None:
        note(describe_files(settings.dataset, files))
    if Ranks.from_environment().is_first:
        note_file(config)
    with HarvestDisplay() as display:
        results = harvest(settings, display)
    if is_first:
        close(results, config)


@app.command()
def plan(
    model: Model = None,
    dataset: Dataset = None,
    layer: Layer = None,
    layers: Layers = None,
    source: Source = None,
    target: TargetSite = None,
    tokens: Tokens = None,
    ctx_len: CtxLen = None,
    bos: Bos = None,
    pack: Pack = None,
    val_unit: ValUnit = None,
    max_doc_tokens: MaxDocTokens = None,
    dedup: Dedup = None,
    skip_bad_lines: SkipBadLines = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    codec: Codec = None,
    seed: Seed = None,
    device: Device = None,
    out: Out = None,
    config: File = None,
    set_: Set = None,
) -> None:
    """Say what `harvest run` with the same options would need: disk and, after a warm-up, time. Writes nothing."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "set_")}
    given = _as_given(config, set_, flags)
    settings = _settings(config, set_, flags)
    from matryoshka.terminal import next_command, result

    from .progress import describe
    from .run import plan as estimate_of

    result(describe(estimate_of(settings)))
    next_command("harvest", "run", *given)


@app.command()
def info(folder: Folder) -> None:
    """Show what a finished shard set holds: model, sites, sizes, norms, sinks."""
    from matryoshka.locations import location
    from matryoshka.tables import FactTable
    from matryoshka.terminal import next_command, show

    from .info import describe

    show(FactTable(folder, describe(location(folder))))
    next_command("train", "run", "--shards", folder)


@app.command()
def verify(
    folder: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Harvest the bad shards again.")] = False,
    batch_size: BatchSize = None,
    device: Device = None,
) -> None:
    """Read a whole shard set and name every shard that is damaged. Ends with exit code 1 when there is one."""
    from matryoshka.locations import location
    from matryoshka.terminal import next_command, result

    from .repair import verify_and_repair

    operational = {"batch_size": batch_size, "device": device}
    operational = {name: value for name, value in operational.items() if value is not None}
    whole = verify_and_repair(location(folder), operational, repair=repair, say=result)
    if not whole:
        next_command("harvest", "verify", folder, "--repair")
        raise typer.Exit(1)


def _settings(config: Path | None, set_: list[str] | None, flags: dict[str, Any]) -> Any:
    """The merged settings. A site without its layer is the site of the layers that are named otherwise."""
    from matryoshka.config import load_config

    from .config import HarvestConfig

    for name in ("source", "target"):
        value = flags[name]
        if value is not None and ":" not in value:
            flags |= {f"{name}_site": value, name: None}
    return load_config(HarvestConfig, "harvest", file=config, overrides=set_ or (), flags=flags)


def _as_given(config: Path | None, set_: list[str] | None, flags: dict[str, Any]) -> list[str]:
    """The options as a person would type them."""
    words = [] if config is None else ["--config", str(config)]
    for name, value in flags.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return [*words, *(word for setting in set_ or () for word in ("--set", setting))]
