"""`evaluate layers`: the numbers of runs on different shard sets, layers 8, 12 and 17 say, in one table.

Nothing is measured: every number is in a report.json already, and the cross-entropy recovered in a
faithfulness.json, where `evaluate faithfulness` made one. FVU and L0 are shares and counts, so layers compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matryoshka.checkpoints import Checkpoint, expand_fleets, find_checkpoint
from matryoshka.config import Config
from matryoshka.errors import UserError
from matryoshka.hook_names import split_hook
from matryoshka.runs import make_directory, publish_json

from ..analyses.faithfulness.result import Faithfulness
from ..analyses.reconstruction.result import Report

LAYERS_FILE = "layers.json"


class LayerPrefix(Config):
    """One nested prefix of one run."""

    prefix_end: int
    fvu: float | None
    fvu_interval: tuple[float, float] | None
    l0: float
    cosine: float
    dead_share: float
    """of all latents of the prefix"""
    ce_recovered: float | None
    """(ce_loss_ablated - ce_loss_spliced) / (ce_loss_ablated - ce_loss_clean), the target site zeroed; null where it
    was not measured"""


class LayerEntry(Config):
    """One run on one shard set."""

    run: str
    step: int | None
    sha256: str
    layer: int | None
    source_hook: str
    target_hook: str
    input: str
    k: int | None
    shard_set: str
    shard_set_digest: str
    n_rows: int
    n_documents: int | None = None
    """which the intervals draw; null where the report drew contexts"""
    prefixes: tuple[LayerPrefix, ...]


class Layers(Config):
    """The content of layers.json."""

    format_version: Literal[1] = 1
    entries: tuple[LayerEntry, ...]
    """by layer, then as they were named"""


def compare_layers(runs: list[Path], out: Path | None = None) -> Layers:
    """Collect the reports of `runs` (a fleet means all of its members), by layer; with `out` publish layers.json there.

    Raises UserError for a run without a report of its newest checkpoint.
    """
    entries = [entry for run in expand_fleets(runs) for entry in _entries(find_checkpoint(run))]
    if not entries:
        raise UserError("no run was named; give two or more, for example data/runs/l8-k48 data/runs/l17-k96")
    result = Layers(entries=tuple(sorted(entries, key=lambda entry: -1 if entry.layer is None else entry.layer)))
    if out is not None:
        make_directory(out)
        publish_json(out / LAYERS_FILE, result.model_dump(mode="json"))
    return result


def _entries(checkpoint: Checkpoint) -> list[LayerEntry]:
    """One for each shard set that the newest weights were evaluated on."""
    folders = sorted(path.parent for path in (checkpoint.run / "eval").glob(f"*/{Report.FILE}"))
    found = [(folder, report) for folder in folders if (report := Report.read(folder)) is not None]
    current = [(folder, report) for folder, report in found if report.transcoder.sha256 == checkpoint.sha256]
    if not current:
        what = "of its newest checkpoint" if found else "yet"
        raise UserError(f"{checkpoint.run} has no report {what}; make one with: evaluate run {checkpoint.run}")
    return [_entry(report, _recovered(folder, checkpoint.sha256)) for folder, report in current]


def _entry(report: Report, recovered: dict[int, float]) -> LayerEntry:
    config, intervals = report.transcoder.config, report.spread.fvu_interval
    prefixes, n_dead, n_latents = [], 0, 0
    for index, (prefix, group) in enumerate(zip(report.threshold, report.groups, strict=True)):
        n_dead, n_latents = n_dead + group.n_dead, n_latents + group.n_latents
        prefixes.append(
            LayerPrefix(
                prefix_end=prefix.prefix_end,
                fvu=prefix.fvu,
                fvu_interval=None if intervals is None else intervals[index],
                l0=prefix.l0,
                cosine=prefix.cosine,
                dead_share=n_dead / n_latents,
                ce_recovered=recovered.get(prefix.prefix_end),
            )
        )
    return LayerEntry(
        run=report.transcoder.run,
        step=report.transcoder.step,
        sha256=report.transcoder.sha256,
        layer=_layer(str(config.get("source_hook"))),
        source_hook=str(config.get("source_hook")),
        target_hook=str(config.get("target_hook")),
        input=str(config.get("input")),
        k=config.get("k"),
        shard_set=report.shard_set.name,
        shard_set_digest=report.shard_set.digest,
        n_rows=report.n_rows,
        n_documents=report.n_documents,
        prefixes=tuple(prefixes),
    )


def _layer(hook: str) -> int | None:
    try:
        return split_hook(hook)[0]
    except UserError:
        return None


def _recovered(folder: Path, sha256: str) -> dict[int, float]:
    """ce_recovered of each prefix end, when a faithfulness.json of the same weights is there."""
    found = Faithfulness.read(folder)
    if found is None or found.transcoder.sha256 != sha256:
        return {}
    pairs = {prefix.prefix_end: prefix.ce_recovered_zero for prefix in found.prefixes}
    return {end: value for end, value in pairs.items() if value is not None}
