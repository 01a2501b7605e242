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
from matryoshka.interop import circuit_tracer, delphi, gemma_scope, gemma_scope_2, native, neuronpedia, saelens
from matryoshka.interop.card import model_card
from matryoshka.interop.inputs import ExportInputs, Format
from matryoshka.interop.provenance import Provenance
from matryoshka.interop.samples import Samples
from matryoshka.interop.weight_files import write_json
from matryoshka.runs import FORMAT_VERSION, changed_fields, check_directory, fsync_path, make_directory, read_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

RECORD_FILE = "export.json"
CARD_FILE = "README.md"

FORMATS: dict[str, Format] = {
    "saelens": saelens,
    "circuit-tracer": circuit_tracer,
    "gemma-scope": gemma_scope,
    "gemma-scope-2": gemma_scope_2,
    "delphi": delphi,
    "neuronpedia": neuronpedia,
    "native": native,
}


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished export."""

    folder: Path
    weights: Path
    """Where the weights are: `folder`, or below it where the format wants so."""
    already_there: bool
    """Whether the folder held just this already, so that nothing was written."""
    dropped: tuple[str, ...] = ()
    """What the format has no room for, in words; also in export.json."""


def export(
    transcoders: Sequence[Transcoder],
    form: str,
    out: Path,
    provenance: Provenance | None = None,
    *,
    shards: ShardSet | None = None,
    samples: Samples | None = None,
) -> Exported:
    """Publish `transcoders` at `out` in the format `form`; all formats but circuit-tracer take one.

    `shards` and `samples` are what delphi and neuronpedia are made of (`ExportInputs`). The folder is written aside and
    renamed. Raises UserError when the format cannot express the transcoder or lacks what it is made of, or `out`
    holds anything else.
    """
    if form not in FORMATS:
        raise UserError(f"there is no format {form!r}; the formats are {', '.join(FORMATS)}")
    if len(transcoders) != 1 and form != "circuit-tracer":
        raise UserError(f"the format {form} holds one transcoder, and {len(transcoders)} were given; export each alone")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    inputs = ExportInputs(
        transcoders=transcoders, provenance=provenance or Provenance(), shards=shards, samples=samples
    )
    record = _record(inputs, form)
    lost = tuple(record["dropped"])
    place = FORMATS[form].place(inputs)
    check_directory(out)
    if out.is_dir() and any(out.iterdir()):
        _refuse_other(out, record)
        return Exported(out, out / place, already_there=True, dropped=lost)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial / place)
    try:
        FORMATS[form].write(inputs, partial / place)
        (partial / CARD_FILE).write_text(model_card(transcoders, form, place, inputs.provenance), encoding="utf-8")
        write_json(partial / RECORD_FILE, record)
        for path in partial.rglob("*"):
            fsync_path(path)
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
        fsync_path(out.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, out / place, already_there=False, dropped=lost)


def dropped(transcoder: Transcoder, form: str) -> tuple[str, ...]:
    """What somebody who opens the export with the format's own tool does not find in it."""
    return tuple(FORMATS[form].dropped(transcoder.config))


def _record(inputs: ExportInputs, form: str) -> dict[str, Any]:
    """What was exported: the same record means the same bytes."""
    provenance = inputs.provenance
    return {
        "format_version": FORMAT_VERSION,
        "format": form,
        "run": provenance.run,
        "step": provenance.step,
        "n_layers": provenance.n_layers,
        "dropped": list(dropped(inputs.transcoder, form)),
        "shard_set": None if inputs.shards is None else inputs.shards.digest,
        "samples": None if inputs.samples is None else inputs.samples.digest,
        "transcoders": {
            transcoder.config.source_hook: {
                "config": transcoder.config.model_dump(mode="json"),
                "weights_sha256": weights_digest(transcoder),
            }
            for transcoder in inputs.transcoders
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
