"""The numbers of a log step, as metrics.jsonl names them."""

from __future__ import annotations

from itertools import accumulate

from .step.step import StepReport


def measurements(report: StepReport, group_sizes: tuple[int, ...]) -> dict[str, float]:
    """One line of metrics.jsonl without its step. fvu is that of the full width; fvu/prefix_<m> of the first m."""
    ends = accumulate(group_sizes)
    return {
        "loss": report.loss,
        "aux_loss": report.aux_loss,
        "l2_loss": report.l2_loss,
        "fvu": report.fvu[-1],
        **{f"fvu/prefix_{end}": fvu for end, fvu in zip(ends, report.fvu, strict=True)},
        "l0": report.l0,
        "dead_share": report.dead_share,
        "threshold": report.threshold,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
    }
