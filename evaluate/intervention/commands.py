"""The commands of `evaluate` that run the language model; ../cli.py puts them among the others."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import (
    ConfigFile,
    Device,
    Model,
    Overrides,
    Prefix,
    Run,
    Runs,
    Shards,
    Split,
    Tokens,
    lm_overrides,
    read_settings,
)


def faithfulness(
    runs: Runs,
    shards: Shards = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Rows to use, in whole contexts, such as 200k; 20k take minutes on a CPU with a small model. (20k)"
        ),
    ] = None,
    split: Split = None,
    prefix: Prefix = None,
    model: Model = None,
    error_term: Annotated[
        bool, typer.Option("--error-term", help="Add y - y_hat to y_hat: then nothing may change. A check.")
    ] = False,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Splicing: loss, KL and top-1 agreement of the model with each nested reconstruction in place of the target."""
    from ..next_step import then_report
    from ..screen import measure

    overrides = [*(set_ or ()), *([f"evaluate.faithfulness.tokens={tokens}"] if tokens else ()), *lm_overrides(model)]
    flags = {"shards": shards, "split": split, "prefix": prefix, "device": device}
    settings = read_settings(config, overrides, flags)
    measure("faithfulness", runs, settings, error_term=error_term)
    then_report(runs, shards)


def logits(
    runs: Runs,
    shards: Shards = None,
    model: Model = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Direct logit attribution (logit lens): the tokens each latent promotes and suppresses."""
    from ..next_step import then_report
    from ..screen import measure

    flags = {"shards": shards, "device": device}
    overrides = [*(set_ or ()), *lm_overrides(model)]
    settings = read_settings(config, overrides, flags)
    measure("logits", runs, settings)
    then_report(runs, shards)


def ablate(
    run: Run,
    latents: Annotated[list[int], typer.Argument(metavar="LATENT", help="Numbers of latents, from 0.")],
    shards: Shards = None,
    scale: Annotated[float, typer.Option(help="Factor on the activation; 0 takes the latent out.")] = 0.0,
    tokens: Tokens = None,
    split: Split = None,
    model: Model = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Ablation (activation patching): what the model predicts differently without single latents, where they fire."""
    from ..next_step import then_steer
    from ..screen import measure

    flags = {"shards": shards, "tokens": tokens, "split": split, "device": device}
    overrides = [*(set_ or ()), *lm_overrides(model)]
    settings = read_settings(config, overrides, flags)
    measure("ablate", [run], settings, latents=latents, scale=scale)
    then_steer(run, latents[0], shards)


def steer(
    run: Run,
    latent: Annotated[int, typer.Argument(help="Number of the latent, from 0.")],
    text: Annotated[str, typer.Option(help="Text to continue.")],
    shards: Shards = None,
    scale: Annotated[float, typer.Option(help="How much of the direction, in units of its largest activation.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0,
    model: Model = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Steering: continue a text as it is, and with a latent's direction added at every token."""
    from ..next_step import then_show
    from ..screen import Screen
    from .screen import show_steered
    from .steering import Writing, steer

    flags = {"shards": shards, "device": device}
    overrides = [*(set_ or ()), *lm_overrides(model)]
    settings = read_settings(config, overrides, flags)
    writing = Writing(n_tokens=tokens, temperature=temperature, seed=seed)
    with Screen("steer") as screen:
        steered = steer(run, latent, text, settings, screen, scale=scale, writing=writing)
    show_steered(steered)
    then_show(run, latent)
