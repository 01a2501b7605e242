"""`train export`: the newest checkpoint of a run, or one of its nested prefixes, in a format of the neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka.checkpoints import STATE_FILE, find_checkpoint, run_folder
from matryoshka.errors import UserError
from matryoshka.interop.export import Exported, export
from matryoshka.interop.provenance import Provenance
from matryoshka.interop.samples import MARK_FILE, Samples
from matryoshka.locations import location, portable_name
from matryoshka.run_facts import read_run_facts
from matryoshka.runs import RUN_FILE, read_json
from matryoshka.shards import ShardSet
from matryoshka.shards.records import has_manifest, read_manifest
from matryoshka.transcoder import Transcoder


def export_runs(
    runs: Sequence[Path],
    form: str,
    *,
    prefix: int | None = None,
    out: Path | None = None,
    n_layers: int | None = None,
    shards: Path | str | None = None,
    tokenizer: str | None = None,
) -> Exported:
    """Export the transcoders of `runs` (run directories or checkpoint folders) to `out`.

    Args:
        prefix: number of nested groups to keep, 1 for the first alone; all by default.
        out: data/exports/<run>-<format>[-prefix<i>] by default.
        n_layers: blocks of the language model, where the run's shard set cannot be asked.
        shards: set whose val rows delphi's cache is made of; by default the one the run was trained on.
        tokenizer: folder or hub name of the one that writes neuronpedia's texts; by default the one of the samples.
    """
    transcoders, provenances = [], []
    for run in runs:
        folder = find_checkpoint(run).folder
        transcoder = Transcoder.load(folder)
        transcoders.append(transcoder if prefix is None else transcoder.prefix(prefix))
        provenances.append(_provenance(folder, n_layers))
    if not transcoders:
        raise UserError("no run was named; give one, such as data/runs/l17-k96")
    provenance = provenances[0]
    if out is None:
        cut = "" if prefix is None else f"-prefix{prefix}"
        out = Path("data") / "exports" / f"{provenance.run}-{form}{cut}"
    if form == "delphi" and shards is None:
        shards = _shard_folder(runs[0])
    samples = _samples(runs[0]) if form == "neuronpedia" else None
    return export(
        transcoders,
        form,
        out,
        provenance,
        shards=None if form != "delphi" or shards is None else ShardSet.open(shards),
        samples=samples if samples is None or tokenizer is None else samples.with_tokenizer(tokenizer),
    )


def _samples(run: Path) -> Samples | None:
    """The samples of a run's newest checkpoint; raises UserError when they are of other weights or of several sets."""
    checkpoint = find_checkpoint(run)
    found = [
        Samples.open(mark.parent)
        for mark in sorted((run_folder(checkpoint.folder) or run).glob(f"eval/*/samples/{MARK_FILE}"))
    ]
    own = [samples for samples in found if samples.weights_sha256 == checkpoint.sha256]
    if len(own) > 1:
        names = ", ".join(samples.folder.parent.name for samples in own)
        raise UserError(f"{run} has samples of several shard sets ({names}); delete all but one of them")
    if found and not own:
        raise UserError(f"the samples of {run} are of an older checkpoint; run `evaluate samples {run}` again")
    return own[0] if own else None


def _provenance(folder: Path, n_layers: int | None) -> Provenance:
    """What the run and its shard set, where they are still there, say beyond the weights."""
    state: dict[str, Any] = {}
    if (folder / STATE_FILE).is_file():
        state = read_json(folder / STATE_FILE, what="checkpoint")
    root = run_folder(folder)
    shards = _shard_folder(folder)
    manifest = None if shards is None else read_manifest(shards)
    facts: dict[str, Any] = {}
    if manifest is not None:
        facts = {
            "dataset": portable_name(str(manifest.dataset.get("name", ""))) or None,
            "ctx_len": manifest.ctx_len,
            "has_bos": manifest.bos_id is not None,
            "n_layers": manifest.model.get("n_layers"),
            "norm_kind": None if manifest.norm is None else manifest.norm.kind,
        }
    if n_layers is not None:
        facts["n_layers"] = n_layers
    step = state.get("step")
    if root is not None:
        facts["used"] = read_run_facts(root, step)
    return Provenance(run=(root or folder).resolve().name, step=step, **facts)


def _shard_folder(folder: Path) -> Path | str | None:
    """The shard set that a run was trained on, where it still is there."""
    root = run_folder(folder)
    config = None if root is None else read_json(root / RUN_FILE, what="run").get("config")
    shards = config.get("shards") if isinstance(config, dict) else None
    return location(shards) if isinstance(shards, str) and has_manifest(shards) else None
