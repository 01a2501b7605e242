"""What a run's and a fleet's folder say of themselves, and the refusal to mix other settings into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.runs import (
    FLEET_FILE,
    FORMAT_VERSION,
    RUN_FILE,
    changed_fields,
    provenance,
    publish_json,
    read_json,
    refuse_changes,
)
from matryoshka.shards import Manifest, ShardSet
from matryoshka.shards.manifest import SPLITS
from matryoshka.shards.records import read_manifest

from .batches.stream import ORDER
from .config import TrainConfig
from .fleet import STREAM_SETTINGS
from .plan import Plan

DIVERGED_FILE = "diverged.json"
_DIVERGED_FILES = (DIVERGED_FILE, "parked.json")
"""The second name is that of older runs."""
_GONE = {"init_scale": 1.0}
"""Settings of earlier runs that decided a result -> the value that is what a run does now."""


def run_record(config: TrainConfig, plan: Plan, shards: ShardSet) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "identity": {
            "config": config.content(),
            "plan": plan.content(),
            "order": ORDER,
            "shard_set": {"name": shards.name, "digest": shards.digest},
        },
        "provenance": provenance(),
    }


def publish_run(folder: Path, record: Mapping[str, Any], shards: ShardSet) -> None:
    """Write run.json: the record, and what the shard set is made of, for whoever reads the run without it."""
    dataset = shards.manifest.dataset
    data = {
        "dataset": dataset.get("name"),
        "revision": dataset.get("commit") or dataset.get("revision"),
        "val_unit": shards.val_unit,
        "documents": {split: shards.split(split).n_documents for split in SPLITS},
    }
    publish_json(folder / RUN_FILE, {**record, "data": data})


def publish_session(folder: Path, first_step: int, used: Mapping[str, Any]) -> None:
    """Add to run.json what the steps from `first_step` on are computed with, unless it is as before."""
    record = read_json(folder / RUN_FILE, what="run")
    sessions = record.get("sessions", [])
    if not sessions or {**sessions[-1], "first_step": first_step} != {"first_step": first_step, **used}:
        publish_json(folder / RUN_FILE, {**record, "sessions": [*sessions, {"first_step": first_step, **used}]})


def refuse_other_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError when `folder` holds another run, or something that is not a run."""
    if (folder / RUN_FILE).exists():
        run = read_json(folder / RUN_FILE, what="run")
        saved = run.get("identity", {})
        ours, here = record["identity"]["shard_set"], record["config"]["shards"]
        _refuse_other_set(folder, saved.get("shard_set", {}), run.get("config", {}).get("shards"), ours, here)
        refuse_changes(folder, "trained", changed_fields(_with_defaults(saved, record), record["identity"]))
    elif folder.is_dir() and any(entry.name not in (".lock", RUN_FILE + ".partial") for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run; choose another --out")


def _refuse_other_set(
    folder: Path, saved: Mapping[str, Any], path: object, ours: Mapping[str, Any], here: object
) -> None:
    """Raise UserError when `folder` is of another shard set than `ours`, with what differs where it is still there.

    `path` and `here` are the folders of the two; `path` is None where no run says it.
    """
    if saved.get("digest") in (None, ours["digest"]):
        return
    why = "no run of it says where that set is"
    if path is not None:
        try:
            changes = changed_fields(_described(read_manifest(str(path))), _described(read_manifest(str(here))))
        except UserError as error:
            why = f"the first cannot be compared any more ({error})"
        else:
            why = "; ".join(changes[:8]) if changes else "their settings are equal, their activations are not"
    raise UserError(
        f"{folder} was trained on the shard set {saved.get('name')} ({path or 'unknown'}), and this is {ours['name']} "
        f"({here}): {why}. Pass --out with a new folder, or --shards with the set of the run; nothing was changed"
    )


def _described(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.settings, "model": manifest.model.get("model"), "dataset": manifest.dataset.get("name")}


def _with_defaults(saved: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity `saved` with the keys of today's, which is that of `record`.

    A setting that did not exist yet had its default; one that is gone is the same where it was what a run does now. A
    plan of before it had lr and k_start trained at the lr and k of its settings, k the same in every step.
    """
    then = {**TrainConfig().model_dump(mode="json"), **saved.get("config", {})}
    plan = {"lr": then["lr"], "k_start": then["k"], "k_steps": 0, **saved.get("plan", {})}
    now = record["identity"]
    gone = {key: then[key] for key, value in _GONE.items() if then.get(key, value) != value}
    return {
        **saved,
        "config": {key: then[key] for key in now["config"]} | gone,
        "plan": {key: plan.get(key) for key in now["plan"]},
    }


def stream_record(config: TrainConfig, shards: ShardSet) -> dict[str, Any]:
    """What decides the batches of a fleet."""
    settings = config.model_dump(mode="json", include={name for name in STREAM_SETTINGS if name != "shards"})
    return {**settings, "order": ORDER, "shard_set": {"name": shards.name, "digest": shards.digest}}


def refuse_other_fleet(folder: Path, stream: Mapping[str, Any], shards: Path | str) -> None:
    """Raise UserError when `folder` is a single run, or a fleet of another stream; `shards` is where the set is."""
    if (folder / RUN_FILE).exists():
        raise UserError(f"{folder} is a single run, not a fleet; choose another --out")
    if (folder / FLEET_FILE).exists():
        fleet = read_json(folder / FLEET_FILE, what="fleet")
        saved = fleet.get("stream", {})
        runs = [folder / str(name) / RUN_FILE for name in fleet.get("members", [])]
        begun = next((read_json(run, what="run") for run in runs if run.is_file()), {})
        path = begun.get("config", {}).get("shards")
        _refuse_other_set(folder, saved.get("shard_set", {}), path, stream["shard_set"], str(shards))
        refuse_changes(folder, "trained", changed_fields(saved, stream, "stream."))


def publish_fleet(folder: Path, stream: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write fleet.json: the stream, and every member that was ever trained in this folder, in order of first coming."""
    known: list[str] = []
    if (folder / FLEET_FILE).exists():
        known = list(read_json(folder / FLEET_FILE, what="fleet").get("members", []))
    together = [*known, *(name for name in names if name not in known)]
    if together != known:
        content = {"format_version": FORMAT_VERSION, "stream": stream, "members": together}
        publish_json(folder / FLEET_FILE, content)


def publish_diverged(folder: Path, *, step: int, loss: float, checkpoint: Path | None) -> None:
    """Write diverged.json: the run went non-finite in step `step`, counted from 1, and its last checkpoint is good."""
    publish_json(
        folder / DIVERGED_FILE,
        {
            "format_version": FORMAT_VERSION,
            "step": step,
            "loss": str(loss),
            "checkpoint": None if checkpoint is None else checkpoint.name,
        },
    )


def diverged_reason(folder: Path) -> str | None:
    """Why the run in `folder` stopped as diverged, or None when it did not."""
    file = next((folder / name for name in _DIVERGED_FILES if (folder / name).exists()), None)
    if file is None:
        return None
    end = read_json(file, what="diverged run")
    good = f"its last good checkpoint is {end['checkpoint']}" if end["checkpoint"] else "it has no checkpoint yet"
    return (
        f"training stopped before step {end['step']}: the loss ({end['loss']}), its gradient or the input is not "
        f"finite; {good}. Try a smaller --lr or a longer train.warmup_steps, in a new --out or under a new name; to "
        f"try again as it is, delete {file}"
    )
