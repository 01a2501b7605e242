"""`evaluate show RUN LATENT`: one latent in the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from matryoshka.errors import UserError
from matryoshka.tables import FactTable
from matryoshka.terminal import console, note, show

from ..analyses import load_analysis
from ..analyses.hierarchy.result import EDGES_FILE, PARENT_FIELDS, parents_by_child, read_columns
from ..analyses.logits.logits import LOGITS_FILE, LogitTokens
from ..analyses.samples.files import Histogram, SamplesMetadata, Window, read_histograms, read_windows
from ..analyses.samples.samples import find_samples
from ..rows.token_text import token_text, visible

_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_TITLES = {"top": "largest activations", "decile": "by tenth of the activations", "random": "where it does not fire"}
# One hue from dark to light on black: the order survives any colour blindness, and a grey terminal.
_SHADES = ("#0b3c5d", "#145a86", "#1f7ab0", "#4a9fd0", "#8cc5e6")
_MARKS = ("\u2039{}\u203a", "\u00ab{}\u00bb")
"""Around a token that fires, and around the one that a window is about, where there are no colours."""
_SHOWN = 8
"""Tokens and parents that are listed."""


def show_latent(
    run: Path,
    latent: int,
    shards: str | None = None,
    tokenizer: str | None = None,
    top: int | None = None,
    to: Console | None = None,
) -> None:
    """Print `latent` from the samples of `run`: its windows, and what other results of the same folder show of it.

    With `top` only that many windows of largest activations. Raises UserError when there are no samples.
    """
    to = to or console()
    folder = find_samples(run, shards)
    metadata = SamplesMetadata.read(folder.parent)
    assert metadata is not None
    histograms = read_histograms(folder)
    if not 0 <= latent < len(histograms):
        raise UserError(f"{run} has the latents 0 to {len(histograms) - 1}, and no latent {latent}")
    text_of = token_text(metadata.tokenizer, metadata.shard_set.model_revision, folder, tokenizer, note)
    windows = read_windows(folder, latent)
    to.print(_head(metadata, latent, histograms[latent]))
    show(FactTable("", _facts(folder.parent, metadata, latent, text_of)), to)
    largest = max((max(window.acts) for window in windows), default=0.0)
    shaded = to.color_system is not None and not to.no_color
    for kind, group in itertools.groupby(windows, key=lambda window: window.kind):
        if top is not None and kind != "top":
            continue
        to.print(Text(f"\n{_TITLES[kind]}", style="bold"))
        for window in itertools.islice(group, top):
            to.print(window_line(window, largest, text_of, shaded=shaded), soft_wrap=False)


def _facts(
    folder: Path, metadata: SamplesMetadata, latent: int, text_of: Callable[[int], str]
) -> list[tuple[str, str]]:
    """What `evaluate logits` and `evaluate hierarchy` found of the same weights, where they were run."""
    d_sae, found = sum(metadata.transcoder.config["group_sizes"]), []
    logits = _result("logits", folder, metadata)
    if logits is not None:
        sides = LogitTokens(folder / LOGITS_FILE, d_sae).of(latent)
        for name, pairs in zip(("raises the logits of", "lowers the logits of"), sides, strict=True):
            words = [_effect(visible(text_of(token)), effect, logits.scale) for token, effect in pairs[:_SHOWN]]
            found.append((name, ", ".join(words) or "no token"))
        found.append(("logit effects", _which_is_which(logits)))
    if _result("hierarchy", folder, metadata) is not None:
        edges = read_columns(folder / EDGES_FILE, ("parent", "child"), d_sae)
        parents = [] if edges is None else parents_by_child(edges, d_sae).rows(latent, PARENT_FIELDS)
        words = ", ".join(f"{parent} (on {inside:.0%} of its rows)" for parent, inside, *_ in parents[:_SHOWN])
        found.append(("parents", words or "none"))
    return found


def _effect(word: str, effect: float, scale: float | None) -> str:
    logit = "" if scale is None else f"{effect * scale:+.2g} "
    return f"{word!r} {logit}({effect:+.2f})"


def _which_is_which(logits: Any) -> str:
    own = "in brackets the direction's own, without the scale of the final norm"
    if logits.scale is None:
        return f"{own}; run evaluate logits again for the change in logits"
    cap = "" if logits.soft_cap is None else f" before the soft cap at {logits.soft_cap:g}"
    return (
        f"per unit of activation{cap}, at the median scale of the final norm ({logits.scale:.3g}, over "
        f"{logits.scale_rows:,} rows); {own}"
    )


def _result(name: str, folder: Path, metadata: SamplesMetadata) -> Any:
    """The result of the analysis `name` in `folder`; None unless it is there and of the weights of the samples."""
    found = load_analysis(name).result.read(folder)
    return found if found is not None and found.transcoder.sha256 == metadata.transcoder.sha256 else None


def window_line(window: Window, largest: float, text_of: Callable[[int], str], *, shaded: bool = True) -> Text:
    """One window: its number and activation, then its tokens, shaded by activation / `largest`.

    Where nothing is `shaded` the token that the window is about is in double angle quotes, and the others that fire
    in single ones.
    """
    label = f"{window.decile}/10" if window.decile is not None else f"{window.rank}"
    line = Text(f"{label:>5} {window.act:8.3f}  ", style="dim")
    for index, (token, act) in enumerate(zip(window.tokens, window.acts, strict=True)):
        style, text = "", visible(text_of(token))
        is_peak = index == window.peak and window.kind != "random"
        if not shaded and (act > 0 or is_peak):
            # Words begin with their space: the quotes go around the word alone.
            word = text.lstrip(" ")
            text = text[: len(text) - len(word)] + _MARKS[is_peak].format(word)
        if shaded and act > 0:
            shade = _SHADES[min(int(act / largest * len(_SHADES)), len(_SHADES) - 1)]
            style = f"{'black' if shade in _SHADES[3:] else 'white'} on {shade}"
        if is_peak:
            style += " bold underline"
        # Text, not markup: brackets in a token mean nothing. Control characters would reach the terminal.
        line.append(text, style=style.strip())
    return line


def _head(metadata: SamplesMetadata, latent: int, histogram: Histogram) -> Text:
    sizes = metadata.transcoder.config["group_sizes"]
    group = next(i for i, end in enumerate(itertools.accumulate(sizes), 1) if latent < end)
    density = histogram.n_rows / metadata.n_rows
    head = Text(f"latent {latent}", style="bold")
    head.append(
        f"  group {group} of {len(sizes)}  fires on {histogram.n_rows:,} of {metadata.n_rows:,} {metadata.split} rows "
        f"({density:.3%})\n",
        style="not bold",
    )
    if histogram.n_rows == 0:
        return head.append("it never fires on these rows", style="not bold")
    used = max(i for i, count in enumerate(histogram.counts) if count > 0) + 1
    most = max(histogram.counts)
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in histogram.counts[:used])
    return head.append(f"0 {bars} {used * histogram.width:.3g}", style="not bold")
