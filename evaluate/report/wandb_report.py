"""The pages of a report as a Weights & Biases artifact, with the numbers of its report.json."""

from __future__ import annotations

from pathlib import Path

from matryoshka.wandb_runs import log_report

from ..analyses.reconstruction.result import Report
from ..config import EvaluateConfig


def log_pages(pages: Path, config: EvaluateConfig) -> None:
    """Log the folder `pages`, made by `evaluate report`, as `config.wandb` says; nothing when it says off.

    Raises UserError when W&B cannot start.
    """
    if config.wandb == "off":
        return
    report = Report.read(pages.parent)
    assert report is not None, "the pages are in the folder of the report.json that they show"
    summary = {}
    for prefix in report.threshold:
        summary |= {f"fvu/prefix_{prefix.prefix_end}": prefix.fvu, f"l0/prefix_{prefix.prefix_end}": prefix.l0}
    log_report(
        pages,
        mode=config.wandb,
        project=config.wandb_project,
        name=report.transcoder.run,
        metadata={
            "transcoder_sha256": report.transcoder.sha256,
            "step": report.transcoder.step,
            "shard_set": report.shard_set.name,
            "shard_set_digest": report.shard_set.digest,
        },
        summary={name: value for name, value in summary.items() if value is not None},
    )
