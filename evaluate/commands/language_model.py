"""The commands of `evaluate` that run the language model; ../cli.py puts them among the others."""

from __future__ import annotations

from typing import Annotated

import typer

from matryoshka.options import Given

from ..config import EvaluateConfig
from .options import DRAWS, Run, Runs, evaluating


@evaluating("faithfulness", "lm", reads=("split", "prefix", *DRAWS))
def faithfulness(
    given: Given[EvaluateConfig],
    runs: Runs,
    error_term: Annotated[
        bool, typer.Option("--error-term", help="Add y - y_hat to y_hat: then nothing may change. A check.")
    ] = False,
) -> None:
    """Splicing: loss, KL and top-1 agreement of the model with each nested reconstruction in place of the target."""
    from .next_step import then_report
    from .terminal import measure

    measure("faithfulness", runs, given.settings, error_term=error_term)
    then_report(runs, given.flags.get("shards"))


@evaluating("logits", "lm")
def logits(
    given: Given[EvaluateConfig],
    runs: Runs,
) -> None:
    """Direct logit attribution (logit lens): the tokens each latent promotes and suppresses."""
    from .next_step import then_report
    from .terminal import measure

    measure("logits", runs, given.settings)
    then_report(runs, given.flags.get("shards"))


@evaluating("ablate", "lm", reads=("tokens", "split", *DRAWS))
def ablate(
    given: Given[EvaluateConfig],
    run: Run,
    latents: Annotated[list[int], typer.Argument(metavar="LATENT", help="Numbers of latents, from 0.")],
    scale: Annotated[float, typer.Option(help="Factor on the activation; 0 takes the latent out.")] = 0.0,
) -> None:
    """Ablation (activation patching): what the model predicts differently without single latents, where they fire."""
    from .next_step import then_steer
    from .terminal import measure

    measure("ablate", [run], given.settings, latents=latents, scale=scale)
    then_steer(run, latents[0], given.flags.get("shards"))


@evaluating("lm", saves=False)
def steer(
    given: Given[EvaluateConfig],
    run: Run,
    latent: Annotated[int, typer.Argument(help="Number of the latent, from 0.")],
    text: Annotated[str, typer.Option(help="Text to continue.")],
    scale: Annotated[float, typer.Option(help="How much of the direction, in units of its largest activation.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0,
) -> None:
    """Steering: continue a text as it is, and with a latent's direction added at every token."""
    from ..analyses.steer.steer import Writing, steer
    from ..analyses.steer.table import show_steered
    from .next_step import then_show
    from .terminal import Terminal

    writing = Writing(n_tokens=tokens, temperature=temperature, seed=seed)
    with Terminal("steer") as terminal:
        steered = steer(run, latent, text, given.settings, terminal, scale=scale, writing=writing)
    show_steered(steered)
    then_show(run, latent)
