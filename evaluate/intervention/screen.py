"""What the commands of this package show on the terminal: tables to stdout, notes to stderr."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from matryoshka.tables import ResultTable

from ..bootstrap import over_documents
from ..show import visible
from ..tables import number, with_interval
from .ablation_file import Ablation, TokenChange
from .faithfulness_file import Faithfulness
from .steering import Steered

_TOKENS_SHOWN = 5


def faithfulness_table(numbers: Faithfulness) -> ResultTable:
    """One line for the model itself, one for each ablation of the target and each nested prefix."""
    table = ResultTable(
        title=f"{numbers.transcoder.run}: the model with y_hat in place of {numbers.shard_set.target_hook}, "
        f"{numbers.n_tokens:,} tokens of {numbers.n_contexts:,} {numbers.shard_set.split} contexts: "
        f"{numbers.shard_set.rows}",
        caption="nats a token; rec. zero, rec. mean: recovered, the share of what that ablation costs that y_hat "
        "gives back. "
        f"[95% interval {over_documents(numbers.n_documents)}], or +- half of it",
    )
    for name in ("target", "L0", "CE", "more", "rec. zero", "rec. mean", "KL", "top-1"):
        table.add_column(name, left=name == "target", drop={"L0": 1, "KL": 2, "rec. mean": 3}.get(name, 0))
    clean = numbers.ce_loss_clean
    table.add_row("as it is", "", f"{clean:.4f}", "", "", "", "", "")
    for name, loss, kl in (
        ("zero", numbers.ce_loss_ablated_zero, numbers.kl_ablated_zero),
        ("mean", numbers.ce_loss_ablated_mean, numbers.kl_ablated_mean),
    ):
        table.add_row(name, "", f"{loss:.4f}", f"{loss - clean:+.4f}", "", "", f"{kl:.4f}", "")
    for one in numbers.prefixes:
        table.add_row(
            f"y_hat of {one.prefix_end:,}",
            f"{one.l0:.1f}",
            f"{one.ce_loss_spliced:.4f}",
            with_interval(one.ce_increase, one.ce_increase_interval, "+.4f"),
            with_interval(one.ce_recovered_zero, one.ce_recovered_zero_interval, ".3f"),
            with_interval(one.ce_recovered_mean, one.ce_recovered_mean_interval, ".3f"),
            f"{one.kl:.4f}",
            f"{one.top1_agreement:.1%}",
        )
    return table


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


def show_steered(steered: Steered) -> None:
    """Both continuations under each other."""
    console = Console()
    added = f"with {steered.scale:g} x {steered.max_act:.3g} of latent {steered.latent}"
    for title, text in (("as it is", steered.plain), (added, steered.steered)):
        console.print(Text(title, style="bold"))
        line = Text(visible(steered.prompt), style="dim")
        console.print(line.append(visible(text), style="not dim"), soft_wrap=True)


def _words(changes: tuple[TokenChange, ...]) -> str:
    return " ".join(f"{visible(change.text)!r}" for change in changes[:_TOKENS_SHOWN])
