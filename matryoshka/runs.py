"""Directories of results: where they are, how a file is published, what made it, and when two settings differ."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.locations import location, location_name

FORMAT_VERSION = 1
RUN_FILE = "run.json"
FLEET_FILE = "fleet.json"
METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
"""Seconds and rates. Apart from the metrics, which are the same bytes however often a run was interrupted."""
CHECKPOINTS = "checkpoints"

_DISTRIBUTIONS = ("matryoshka-transcoders", "torch", "transformer-lens", "transformers", "zarr", "numcodecs", "numpy")


def default_shards_path(layer: int) -> Path:
    """Where `harvest run --layer 17` writes when no --out is given: data/l17."""
    return Path("data") / f"l{layer}"


def default_run_path(shards: Path | str, k: int) -> Path:
    """Where `train run --shards data/l17` writes when no --out is given: data/runs/l17-k96.

    Beside the set, so that sets of one name in different folders have runs of their own; those of a set in an object
    store are in data/runs.
    """
    where = location(shards)
    # As it was written, where that has a name: relative stays relative. `.` and `..` have none.
    parent = Path("data")
    if isinstance(where, Path):
        parent = (where if where.name not in ("", "..") else where.resolve()).parent
    return parent / "runs" / f"{location_name(shards)}-k{k}"


def check_directory(path: Path) -> None:
    """Raise UserError when `make_directory` could not make `path`; makes nothing, so that it can be asked early."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"the folder {path} cannot be made ({place} is not a folder); choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"the folder {place} is not writable; choose another --out or fix its permissions")


def make_directory(path: Path) -> None:
    """Create `path` and its parents; raises UserError when the place is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made ({error.strerror}); choose another --out") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} is not writable; choose another --out or fix its permissions")


def fsync_path(path: Path | str) -> None:
    """Force a file or directory to the disk. A renamed file is only safe once its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_bytes(path: Path, content: bytes) -> None:
    """Write `path` so that it is seen whole or not at all, also after a power cut: write aside, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_path(path.parent)


def publish_json(path: Path, content: object) -> None:
    """`publish_bytes` of `json_bytes`."""
    publish_bytes(path, json_bytes(content))


def json_bytes(content: object) -> bytes:
    """Indented JSON with sorted keys: equal content gives equal bytes. NaN is refused."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=True).encode() + b"\n"


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object written by `publish_json`; `what` names it in the error."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not a {what}: it has no {path.name}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read as the record of a {what}: {error}") from error
    return parse_json(content, str(path), what=what)


def parse_json(text: bytes, path: str, *, what: str) -> dict[str, Any]:
    """The JSON object in the content of a file that `publish_json` wrote; `path` and `what` name it in the error."""
    try:
        content = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as the record of a {what}: {error}") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has format_version {found!r}; this version reads {FORMAT_VERSION}")
    return content


def changed_fields(saved: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two settings, one "key: old -> new" each, in the order of the keys."""
    changes: list[str] = []
    for key in sorted({*saved, *new}):
        old, now = saved.get(key), new.get(key)
        if isinstance(old, Mapping) and isinstance(now, Mapping):
            changes += changed_fields(old, now, f"{prefix}{key}.")
        elif old != now:
            changes.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(now)}")
    return changes


def refuse_changes(folder: object, made_by: str, changes: Sequence[str]) -> None:
    """Raise UserError when `folder` holds results of other settings; mixing them is never right."""
    if changes:
        raise UserError(
            f"{folder} was {made_by} with other settings ({'; '.join(changes)}). "
            "Pass --out with a new folder, or the old settings to continue; nothing was changed"
        )


def provenance() -> dict[str, Any]:
    """What made a result: versions of the libraries and the commit of the source tree, when there is one."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "git_commit": _git_commit()}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; a second command on the same folder is refused at once.

    The lock belongs to the open file, so it vanishes with the process however that ends.
    """
    import fcntl

    path = folder / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being written by another process; wait for it, or stop it first") from error
        except OSError as error:
            raise UserError(
                f"the disk of {folder} cannot lock files ({error.strerror}); choose another disk with --out"
            ) from error
        yield


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
