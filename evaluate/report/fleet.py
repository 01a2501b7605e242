"""`evaluate report FLEET`: all runs of a fleet on one page; what differs between them, what it did, what it cost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from matryoshka.checkpoints import Checkpoint, expand_fleets, find_checkpoint
from matryoshka.errors import UserError
from matryoshka.run_facts import json_lines, seconds_of
from matryoshka.runs import FLEET_FILE, METRICS_FILE, RUN_FILE, TIMING_FILE, make_directory

from ..analyses.reconstruction.result import Report
from ..analyses.reconstruction.run import RunAnalysis
from ..analysis import Progress, answer
from ..config import EvaluateConfig
from .build import REPORT_FOLDER, Pages
from .data_file import write_data
from .overview import run_facts
from .page_set import FLEET_PAGES, INDEX_FILE, write_pages
from .parts import find_parts

_PLACES = ("out", "device")
"""Settings that every member has its own of, and that decide nothing."""


def is_fleet(runs: list[Path]) -> bool:
    """Whether `runs` are to be shown together: several of them, or the folder of a fleet."""
    return len(runs) > 1 or (len(runs) == 1 and (runs[0] / FLEET_FILE).is_file())


def make_fleet_report(runs: list[Path], config: EvaluateConfig, *, progress: Progress | None = None) -> Pages:
    """Write FLEET/eval/<set>-<digest>/report/ (or `config.out`/report/), anew each time; equal inputs, equal bytes.

    Members without a report.json are evaluated first, on `config.shards` or the set that they were trained on; all must
    be of one shard set. Raises UserError for invalid input.
    """
    if len(runs) > 1 and config.out is None:
        raise UserError(
            "several runs have no folder in common; pass --set evaluate.out=DIR for the page that shows them together"
        )
    checkpoints = [find_checkpoint(run) for run in expand_fleets(runs)]
    if config.shards is not None or not all(_folders(checkpoint) for checkpoint in checkpoints):
        own = config.model_copy(update={"out": None, "split": "val", "prefix": None})
        folders = [one.path.parent for one in answer(RunAnalysis(), runs, own, progress)]
    else:
        folders = [_evaluated(checkpoint) for checkpoint in checkpoints]
    reports = [_report(folder, checkpoint) for folder, checkpoint in zip(folders, checkpoints, strict=True)]
    sets = {report.shard_set.digest: report.shard_set.name for report in reports}
    if len(sets) > 1:
        raise UserError(
            f"the runs were evaluated on several shard sets ({', '.join(sorted(sets.values()))}), whose numbers cannot "
            "be compared; name one with --shards"
        )
    name = runs[0].resolve().name if config.out is None else config.out.resolve().name
    parent = runs[0] / "eval" / folders[0].name if config.out is None else config.out
    make_directory(parent)
    folder, partial = parent / REPORT_FOLDER, parent / f"{REPORT_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    members = [
        _member(checkpoint, report, own, folder)
        for checkpoint, report, own in zip(checkpoints, reports, folders, strict=True)
    ]
    facts = reports[0].shard_set.model_dump(mode="json")
    content = {"name": name, "shard_set": facts, "members": members, "keys": differing([m["config"] for m in members])}
    write_data(partial / "data", "fleet", content)
    write_pages(partial, name, FLEET_PAGES)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    notes = () if config.wandb == "off" else ("wandb: only the pages of single runs are logged, these are not",)
    return Pages(folder / INDEX_FILE, notes)


def differing(configs: list[dict[str, Any]]) -> list[str]:
    """The settings in which the members differ, in their order; one that some lack counts as null there."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def _member(checkpoint: Checkpoint, report: Report, own: Path, page: Path) -> dict[str, Any]:
    run = run_facts(checkpoint.run / RUN_FILE) or {}
    settings = {key: value for key, value in run.get("config", {}).items() if key not in _PLACES}
    faithfulness = find_parts(own, report.transcoder.sha256).records.get("faithfulness")
    recovered = None
    if faithfulness is not None:
        recovered = [prefix.get("ce_recovered_mean") for prefix in faithfulness["prefixes"]]
    metrics = json_lines(checkpoint.run / METRICS_FILE)
    index = own / REPORT_FOLDER / INDEX_FILE
    return {
        "name": checkpoint.name,
        "step": checkpoint.step,
        "finished": checkpoint.is_finished,
        "config": {**settings, "group_sizes": report.transcoder.config["group_sizes"]},
        "prefix_ends": [prefix.prefix_end for prefix in report.threshold],
        "fvu": [prefix.fvu for prefix in report.threshold],
        "l0": [prefix.l0 for prefix in report.threshold],
        "dead": [group.dead_share for group in report.groups],
        "dead_share": report.total.dead_share,
        "ce_recovered": recovered,
        "loss": metrics[-1].get("loss") if metrics else None,
        "seconds": seconds_of(json_lines(checkpoint.run / TIMING_FILE), settings.get("batch_tokens")),
        "pages": Path(os.path.relpath(index, page)).as_posix() if index.is_file() else None,
    }


def _evaluated(checkpoint: Checkpoint) -> Path:
    """The one evaluation folder of a run."""
    found = _folders(checkpoint)
    if len(found) != 1:
        raise UserError(f"{checkpoint.run} has evaluations on several shard sets; name one with --shards")
    return found[0]


def _folders(checkpoint: Checkpoint) -> list[Path]:
    """Its evaluation folders, one a shard set."""
    return sorted(path.parent for path in (checkpoint.run / "eval").glob(f"*/{Report.FILE}"))


def _report(folder: Path, checkpoint: Checkpoint) -> Report:
    report = Report.read(folder)
    if report is None or report.transcoder.sha256 != checkpoint.sha256:
        raise UserError(
            f"{folder} is not of the newest checkpoint of {checkpoint.run}; pass --shards to evaluate again"
        )
    return report
