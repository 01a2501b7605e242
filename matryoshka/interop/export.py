"""Write a transcoder as a folder of a neighbour's format, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.interop import circuit_tracer, delphi, gemma_scope, gemma_scope_2, neuronpedia, saelens
from matryoshka.interop.card import model_card
from matryoshka.interop.origin import Origin
from matryoshka.interop.weight_files import write_json
from matryoshka.runs import FORMAT_VERSION, changed_fields, check_directory, fsync_path, make_directory, read_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

RECORD_FILE = "export.json"
CARD_FILE = "README.md"

FORMATS = ("saelens", "circuit-tracer", "gemma-scope", "gemma-scope-2", "delphi", "neuronpedia", "native")


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished export."""

    folder: Path
    weights: Path
    """Where the weights lie: `folder`, or below it where the format wants so."""
    already_there: bool
    """Whether the folder held just this already, so that nothing was written."""
    dropped: tuple[str, ...] = ()
    """What the format has no room for, in words; also in export.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What some formats are made of besides the weights."""

    shards: ShardSet | None = None
    """For delphi: the set whose val rows go into the cache."""
    samples: neuronpedia.Samples | None = None
    """For neuronpedia: the examples of each latent."""


def export(
    transcoders: Sequence[Transcoder],
    form: str,
    out: Path,
    origin: Origin | None = None,
    material: Material | None = None,
) -> Exported:
    """Publish `transcoders` at `out` in the format `form`; all formats but circuit-tracer take one.

    The folder is written beside its place and renamed. Raises UserError when the format cannot express the transcoder
    or lacks its material, or `out` holds anything else.
    """
    origin, material = origin or Origin(), material or Material()
    if form not in FORMATS:
        raise UserError(f"there is no format {form!r}; the formats are {', '.join(FORMATS)}")
    if len(transcoders) != 1 and form != "circuit-tracer":
        raise UserError(f"the format {form} holds one transcoder, and {len(transcoders)} were given; export each alone")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    record = _record(transcoders, form, origin, material)
    place = _place(transcoders[0], form, origin)
    check_directory(out)
    if out.is_dir() and any(out.iterdir()):
        _refuse_other(out, record)
        return Exported(out, out / place, already_there=True, dropped=dropped(transcoders[0], form))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial / place)
    try:
        _write(transcoders, form, partial / place, origin, material)
        (partial / CARD_FILE).write_text(model_card(transcoders, form, place, origin), encoding="utf-8")
        write_json(partial / RECORD_FILE, record)
        for path in partial.rglob("*"):
            fsync_path(path)
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
        fsync_path(out.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, out / place, already_there=False, dropped=dropped(transcoders[0], form))


def dropped(transcoder: Transcoder, form: str) -> tuple[str, ...]:
    """What somebody who opens the export with the format's own tool does not find in it."""
    config = transcoder.config
    ends = ", ".join(map(str, config.prefix_ends))
    lost: list[str] = []
    if form in ("delphi", "neuronpedia"):
        lost.append("the weights: the format holds activations of latents")
    if len(config.group_sizes) > 1 and form != "native":
        if form in ("saelens", "gemma-scope-2", "circuit-tracer"):
            lost.append(f"the nested prefixes {ends}: kept as matryoshka_widths, which only this project reads")
        else:
            lost.append(f"the nested prefixes {ends}; export one of them alone with --prefix")
    if form == "gemma-scope":
        if config.k is not None:
            lost.append(f"k = {config.k}")
        lost.append(
            f"the model {config.model or 'of unknown name'} and its revision; the layer is in the folder's name"
        )
    return tuple(lost)


def _place(transcoder: Transcoder, form: str, origin: Origin) -> str:
    """Where inside the folder the files belong; "." where the format leaves it open."""
    if form == "neuronpedia":
        return neuronpedia.place(transcoder, origin)
    modules = {"gemma-scope": gemma_scope, "gemma-scope-2": gemma_scope_2, "delphi": delphi}
    return modules[form].place(transcoder) if form in modules else "."


def _write(transcoders: Sequence[Transcoder], form: str, folder: Path, origin: Origin, material: Material) -> None:
    first = transcoders[0]
    if form == "circuit-tracer":
        circuit_tracer.write(transcoders, folder, origin)
    elif form == "native":
        first.save(folder)
    elif form == "delphi":
        if material.shards is None:
            raise UserError("delphi's cache is made from activations, and the run's shard set is gone; pass --shards")
        delphi.write(first, folder, material.shards)
    elif form == "neuronpedia":
        if material.samples is None:
            raise UserError("Neuronpedia's data is made from samples; run `evaluate samples RUN` first")
        texts = material.samples.token_texts()
        neuronpedia.write(first, folder, origin, material.samples, texts.text)
    else:
        {"saelens": saelens, "gemma-scope": gemma_scope, "gemma-scope-2": gemma_scope_2}[form].write(
            first, folder, origin
        )


def _record(transcoders: Sequence[Transcoder], form: str, origin: Origin, material: Material) -> dict[str, Any]:
    """What was exported: the same record means the same bytes."""
    return {
        "format_version": FORMAT_VERSION,
        "format": form,
        "run": origin.run,
        "step": origin.step,
        "n_layers": origin.n_layers,
        "dropped": list(dropped(transcoders[0], form)),
        "shard_set": None if material.shards is None else material.shards.digest,
        "samples": None if material.samples is None else material.samples.digest,
        "transcoders": {
            transcoder.config.source_hook: {
                "config": transcoder.config.model_dump(mode="json"),
                "weights_sha256": weights_digest(transcoder),
            }
            for transcoder in transcoders
        },
    }


def weights_digest(transcoder: Transcoder) -> str:
    """sha256 over names, shapes and bytes of the weights."""
    hasher = hashlib.sha256()
    for name, weight in sorted(transcoder.named_parameters()):
        hasher.update(f"{name}{tuple(weight.shape)}".encode())
        hasher.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _refuse_other(out: Path, record: dict[str, Any]) -> None:
    if not (out / RECORD_FILE).is_file():
        raise UserError(f"{out} is not empty and was not made by `train export`; choose another --out")
    found = read_json(out / RECORD_FILE, what="export")
    # Exports of before `dropped` was recorded say the same without it.
    changes = changed_fields({"dropped": record["dropped"], **found}, json.loads(json.dumps(record)))
    if changes:
        shown = "; ".join(changes[:3]) + ("; ..." if len(changes) > 3 else "")
        raise UserError(f"{out} holds another export ({shown}); choose another --out, or delete that folder")
