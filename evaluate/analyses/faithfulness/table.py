"""The table of `evaluate faithfulness`."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ...tables import over_documents, with_interval
from .result import Faithfulness


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
