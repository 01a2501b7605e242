"""`train export`: the newest checkpoint of a run, or one of its nested prefixes, in a format of the neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from matryoshka.errors import UserError
from matryoshka.interop.export import Exported, export
from matryoshka.interop.origin import Origin
from matryoshka.runs import RUN_FILE, read_json
from matryoshka.shards.manifest import Manifest
from matryoshka.shards.reader import has_manifest, read_manifest
from matryoshka.transcoder import CONFIG_FILE, WEIGHTS_FILE, Transcoder

from .checkpoint import STATE_FILE, list_checkpoints


def export_runs(
    runs: Sequence[Path],
    form: str,
    *,
    prefix: int | None = None,
    out: Path | None = None,
    n_layers: int | None = None,
) -> Exported:
    """Export the transcoders of `runs` (run directories or checkpoint folders) to `out`.

    Args:
        prefix: number of nested groups to keep, 1 for the first alone; all by default.
        out: data/exports/<run>-<format>[-prefix<i>] by default.
        n_layers: blocks of the language model, where the run's shard set cannot be asked.
    """
    transcoders, origins = [], []
    for run in runs:
        folder = checkpoint_folder(run)
        transcoder = Transcoder.load(folder)
        transcoders.append(transcoder if prefix is None else _cut(transcoder, prefix, run))
        origins.append(_origin(run, folder, n_layers))
    if not transcoders:
        raise UserError("no run was named; give one, such as data/runs/l17-k96")
    origin = origins[0]
    if out is None:
        cut = "" if prefix is None else f"-prefix{prefix}"
        out = Path("data") / "exports" / f"{origin.run}-{form}{cut}"
    return export(transcoders, form, out, origin)


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


def _cut(transcoder: Transcoder, prefix: int, run: Path) -> Transcoder:
    ends = transcoder.prefix_ends
    if not 1 <= prefix <= len(ends):
        listed = ", ".join(f"{i} ({end:,} latents)" for i, end in enumerate(ends, start=1))
        raise UserError(f"{run} has no prefix {prefix}; its nested prefixes are {listed}")
    return transcoder.prefix(prefix)


def _origin(run: Path, folder: Path, n_layers: int | None) -> Origin:
    """What the run and its shard set, where they are still there, say beyond the weights."""
    state: dict[str, Any] = {}
    if (folder / STATE_FILE).is_file():
        state = read_json(folder / STATE_FILE, what="checkpoint")
    root = next((place for place in (run, *folder.resolve().parents[:2]) if (place / RUN_FILE).is_file()), None)
    manifest = None if root is None else _manifest(read_json(root / RUN_FILE, what="run"))
    facts: dict[str, Any] = {}
    if manifest is not None:
        facts = {
            "dataset": _portable(str(manifest.dataset.get("name", ""))) or None,
            "ctx_len": manifest.ctx_len,
            "has_bos": manifest.bos_id is not None,
            "n_layers": manifest.model.get("n_layers"),
            "norm_kind": None if manifest.norm is None else manifest.norm.kind,
        }
    if n_layers is not None:
        facts["n_layers"] = n_layers
    return Origin(run=(root or folder).resolve().name, step=state.get("step"), **facts)


def _manifest(record: dict[str, Any]) -> Manifest | None:
    """The manifest of the shard set that a run was trained on, where it still lies there."""
    config = record.get("config")
    shards = config.get("shards") if isinstance(config, dict) else None
    if not isinstance(shards, str) or not has_manifest(Path(shards)):
        return None
    return read_manifest(Path(shards))


def _portable(name: str) -> str:
    """A name of the hub as it is; of a path of this machine only the last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name
