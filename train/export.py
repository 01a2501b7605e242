"""`train export`: the newest checkpoint of a run, or one of its nested prefixes, in a format of the neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.interop.export import Exported, export
from matryoshka.interop.origin import Origin
from matryoshka.interop.samples import MARK_FILE, Samples
from matryoshka.locations import location, portable_name
from matryoshka.run_facts import read_run_facts
from matryoshka.runs import RUN_FILE, read_json
from matryoshka.shards import ShardSet
from matryoshka.shards.records import has_manifest, read_manifest
from matryoshka.transcoder import CONFIG_FILE, WEIGHTS_FILE, Transcoder

from .checkpoint import STATE_FILE, list_checkpoints


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
    transcoders, origins = [], []
    for run in runs:
        folder = checkpoint_folder(run)
        transcoder = Transcoder.load(folder)
        transcoders.append(transcoder if prefix is None else transcoder.prefix(prefix))
        origins.append(_origin(folder, n_layers))
    if not transcoders:
        raise UserError("no run was named; give one, such as data/runs/l17-k96")
    origin = origins[0]
    if out is None:
        cut = "" if prefix is None else f"-prefix{prefix}"
        out = Path("data") / "exports" / f"{origin.run}-{form}{cut}"
    if form == "delphi" and shards is None:
        shards = _shard_folder(runs[0])
    samples = _samples(runs[0]) if form == "neuronpedia" else None
    return export(
        transcoders,
        form,
        out,
        origin,
        shards=None if form != "delphi" or shards is None else ShardSet.open(shards),
        samples=samples if samples is None or tokenizer is None else samples.with_tokenizer(tokenizer),
    )


def _samples(run: Path) -> Samples | None:
    """The samples of a run's newest checkpoint; raises UserError when they are of other weights or of several sets."""
    folder = checkpoint_folder(run)
    with (folder / WEIGHTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = [
        Samples.open(mark.parent) for mark in sorted((_run_folder(folder) or run).glob(f"eval/*/samples/{MARK_FILE}"))
    ]
    own = [samples for samples in found if samples.weights_sha256 == digest]
    if len(own) > 1:
        names = ", ".join(samples.folder.parent.name for samples in own)
        raise UserError(f"{run} has samples of several shard sets ({names}); delete all but one of them")
    if found and not own:
        raise UserError(f"the samples of {run} are of an older checkpoint; run `evaluate samples {run}` again")
    return own[0] if own else None


def checkpoint_folder(run: Path) -> Path:
    """Where the weights of `run` lie: itself when it has some, else its newest checkpoint."""
    if (run / WEIGHTS_FILE).is_file() and (run / CONFIG_FILE).is_file():
        return run
    if not (run / RUN_FILE).is_file():
        raise UserError(
            f"{run} is neither a run (it has no {RUN_FILE}) nor a transcoder (no {WEIGHTS_FILE} with {CONFIG_FILE}); "
            "give the folder that `train run` made"
        )
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint yet; let `train run` reach its first one, then export again")
    return checkpoints[-1].folder


def _origin(folder: Path, n_layers: int | None) -> Origin:
    """What the run and its shard set, where they are still there, say beyond the weights."""
    state: dict[str, Any] = {}
    if (folder / STATE_FILE).is_file():
        state = read_json(folder / STATE_FILE, what="checkpoint")
    root = _run_folder(folder)
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
    return Origin(run=(root or folder).resolve().name, step=step, **facts)


def _run_folder(folder: Path) -> Path | None:
    """The run that a checkpoint folder, or itself, belongs to."""
    folder = folder.resolve()
    return next((place for place in (folder, *folder.parents[:2]) if (place / RUN_FILE).is_file()), None)


def _shard_folder(folder: Path) -> Path | str | None:
    """The shard set that a run was trained on, where it still lies there."""
    root = _run_folder(folder)
    config = None if root is None else read_json(root / RUN_FILE, what="run").get("config")
    shards = config.get("shards") if isinstance(config, dict) else None
    return location(shards) if isinstance(shards, str) and has_manifest(shards) else None
