"""Find and read a transcoder of any known format, in a folder or in a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from matryoshka.checkpoints import find_checkpoint
from matryoshka.errors import UserError
from matryoshka.interop import circuit_tracer, gemma_scope, gemma_scope_2, hub, saelens
from matryoshka.locations import local_path
from matryoshka.runs import RUN_FILE
from matryoshka.transcoder import CONFIG_FILE, WEIGHTS_FILE, Transcoder

_FILES = {
    "ours": (WEIGHTS_FILE, CONFIG_FILE),
    "saelens": (saelens.WEIGHTS_FILE, saelens.CONFIG_FILE),
    "gemma-scope-2": (gemma_scope_2.WEIGHTS_FILE, gemma_scope_2.CONFIG_FILE),
    "gemma-scope": (gemma_scope.FILE,),
    "circuit-tracer": (circuit_tracer.CONFIG_FILE,),
}
_MAX_LISTED = 8
_GEMMA_SCOPE_MODEL = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)")


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """A transcoder among files: its folder (POSIX, relative, "." for the top) and its format."""

    folder: str
    format: str


def from_pretrained(
    path_or_repo: str | Path,
    *,
    layer: int | None = None,
    norm_kind: str | None = None,
    revision: str | None = None,
) -> Transcoder:
    """Read a transcoder of any known format, on the CPU in float32.

    Args:
        path_or_repo: a folder (or a run, whose newest checkpoint is meant, or a params.npz), else `user/repo` or
            `user/repo/sub/folder` of the hub.
        layer: which one of a circuit-tracer set; the layer of a params.npz whose path has no `layer_N`.
        norm_kind: "rms" or "layer", where it is known and the format is ambiguous (hook_names.py).
        revision: commit, branch or tag, for the hub.

    Raises:
        UserError: nothing of the kind is there, several are, or it needs what we cannot express.
    """
    path = local_path(path_or_repo)
    if path.exists():
        folder, form = locate(path)
        return _read(folder, form, layer=layer, norm_kind=norm_kind)
    repo, inside = hub.split_repo(str(path))
    files = hub.list_files(repo, revision=revision)
    below = [file for file in files if not inside or file.startswith(inside + "/")]
    found = _one(find(below), str(path_or_repo))
    patterns = [PurePosixPath(found.folder, name).as_posix() for name in _FILES[found.format]]
    if found.format == "circuit-tracer":
        name = "layer_*" if layer is None else f"layer_{layer}"
        patterns.append(PurePosixPath(found.folder, f"{name}.safetensors").as_posix())
    folder = hub.download(repo, patterns, revision=revision) / found.folder
    return _read(folder, found.format, layer=layer, norm_kind=norm_kind, repo=repo)


def locate(path: Path) -> tuple[Path, str]:
    """Where the one transcoder at or below `path` is (its folder, or a params.npz), and its format.

    Raises UserError when there is none, or several.
    """
    if path.is_file() and path.suffix == ".npz":
        return path, "gemma-scope"
    folder = find_checkpoint(path).folder if (path / RUN_FILE).is_file() else path
    found = _one(find(_relative_files(folder)), str(path))
    return folder / found.folder, found.format


def find(files: Iterable[str]) -> list[Found]:
    """The transcoders among relative POSIX paths, sorted; what is below another one is not looked at."""
    names: dict[str, set[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        names.setdefault(path.parent.as_posix(), set()).add(path.name)
    found: list[Found] = []
    for folder in sorted(names, key=lambda name: (len(PurePosixPath(name).parts), name)):
        if any(PurePosixPath(folder).is_relative_to(other.folder) for other in found if other.folder != "."):
            continue
        for form, wanted in _FILES.items():
            here = names[folder] >= set(wanted)
            if form == "circuit-tracer":
                here = here and any(circuit_tracer.LAYER_FILE.fullmatch(name) for name in names[folder])
            if here:
                found.append(Found(folder, form))
                break
        if found and found[-1].folder == ".":
            return found
    return found


def _one(found: list[Found], place: str) -> Found:
    if not found:
        known = "; ".join(f"{form}: {' + '.join(files)}" for form, files in _FILES.items())
        raise UserError(f"{place} holds no transcoder of a known format ({known}, with layer_N.safetensors)")
    if len(found) > 1:
        listed = ", ".join(item.folder for item in found[:_MAX_LISTED])
        more = ", ..." if len(found) > _MAX_LISTED else ""
        raise UserError(f"{place} holds {len(found)} transcoders; name one of them: {place}/<one of {listed}{more}>")
    return found[0]


def _read(folder: Path, form: str, *, layer: int | None, norm_kind: str | None, repo: str = "") -> Transcoder:
    if form == "ours":
        return Transcoder.load(folder)
    if form == "saelens":
        return saelens.read(folder, norm_kind=norm_kind)
    if form == "gemma-scope-2":
        return gemma_scope_2.read(folder)
    if form == "gemma-scope":
        return gemma_scope.read(folder, layer=layer, model=_gemma_model(repo or str(folder)))
    return circuit_tracer.read(folder, layer=layer, norm_kind=norm_kind)


def _relative_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _gemma_model(place: str) -> str:
    """The model that a Gemma Scope repository is about, from its name; empty when it is not in the path."""
    match = _GEMMA_SCOPE_MODEL.search(place)
    return "" if match is None else f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}"
