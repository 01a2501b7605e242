"""The table of `evaluate ablate`."""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka.tables import ResultTable

from ...rows.token_text import visible
from ...tables import number, with_interval
from .result import Ablation, TokenChange

_TOKENS_SHOWN = 5


def ablation_table(ablations: Sequence[Ablation]) -> ResultTable:
    """One line a latent of one run: what its absence does, and to which tokens."""
    first = ablations[0]
    table = ResultTable(
        title=f"{first.transcoder.run}: activations times {first.scale:g} at {first.shard_set.target_hook}",
        caption="mean over the positions where the latent fires; loss: change of -log p(next token), nats; top-1: "
        "share of them where another token becomes the most likely one. [95% interval over documents], or +- half of "
        "it",
    )
    for name in ("latent", "positions", "docs", "act", "loss", "KL", "top-1"):
        table.add_column(name, drop={"docs": 1}.get(name, 0))
    for name in ("more likely", "less likely"):
        table.add_column(name, left=True, stack="below")
    for one in ablations:
        table.add_row(
            str(one.latent),
            f"{one.n_positions:,}",
            number(one.n_documents, ",d"),
            number(one.mean_act, ".2f"),
            with_interval(one.loss_change, one.loss_change_interval, "+.4f"),
            number(one.kl, ".4f"),
            number(one.top1_changed, ".1%"),
            _words(one.raised),
            _words(one.lowered),
        )
    return table


def _words(changes: tuple[TokenChange, ...]) -> str:
    return " ".join(f"{visible(change.text)!r}" for change in changes[:_TOKENS_SHOWN])
