"""What a finished shard set holds, for people."""

from __future__ import annotations

from pathlib import Path

from matryoshka.held_out import HELD_OUT
from matryoshka.shards import ShardSet
from matryoshka.shards.scaled import SINK_NORM
from matryoshka.shards.writer import measure_codec

from .estimate import gigabytes

SIDES = ("source", "target")
FP16_LIMIT = 65504.0
"""The largest number that float16 holds (IEEE 754 binary16)."""


def describe(path: Path | str) -> list[tuple[str, str]]:
    """(what, value) lines of the set at `path`. Only its small arrays are read. Raises UserError as `ShardSet.open`."""
    shards = ShardSet.open(path)
    manifest = shards.manifest
    n_contexts = shards.train.n_contexts + shards.val.n_contexts
    n_tokens = n_contexts * shards.ctx_len
    n_bytes = shards.bytes_on_disk()
    measured = manifest.measured or measure_codec(manifest, shards.records)
    ratio = measured["compression_ratio"]
    model, dataset = manifest.model, manifest.dataset
    revision = model.get("revision")
    rows = [
        ("model", f"{model.get('model')}{f' @ {revision}' if revision else ''}, {model.get('weight_dtype')}"),
        ("text", " @ ".join(str(part) for part in (dataset.get("name"), _commit(dataset)) if part)),
        ("source", _site(shards, "source")),
        ("target", _site(shards, "target")),
        *((f"block {layer}", str(note)) for layer, note in model.get("adds_more", {}).items()),
        ("norm behind the source", _norm(shards)),
        ("tokens", f"{n_tokens:,} in {n_contexts:,} contexts of {shards.ctx_len}"),
        ("train", _split(shards, "train")),
        ("val", _split(shards, "val")),
        ("held out", HELD_OUT[shards.val_unit]),
        ("on disk", f"{gigabytes(n_bytes)}, {n_bytes / n_tokens:.0f} bytes per token"),
        ("codec", f"{manifest.codec}: {ratio:.3f} of raw bfloat16 ({1 / ratio:.2f}x smaller)"),
    ]
    for side in SIDES:
        if (error := measured.get(f"{side}_error")) is not None:
            rows.append((f"{side}: error of {manifest.codec}", f"{error:.2%} of the norm, outside attention sinks"))
    for side in SIDES:
        rows += _statistics(shards, side)
    return rows


def _site(shards: ShardSet, side: str) -> str:
    facts = shards.manifest.source if side == "source" else shards.manifest.target
    return f"{facts.site} of layer {facts.layer}, {facts.width} wide ({facts.hook_point})"


def _norm(shards: ShardSet) -> str:
    norm = shards.manifest.norm
    return "none" if norm is None else f"{norm.kind}, eps {norm.eps:g}{', with bias' if norm.has_bias else ''}"


def _split(shards: ShardSet, name: str) -> str:
    split = shards.split(name)
    n_rows = sum(record.n_rows for record in shards.records if record.split == name)
    return (
        f"{split.n_contexts:,} contexts in {split.n_shards} shards, {n_rows:,} rows without special tokens, of "
        f"{split.n_documents:,} documents"
    )


def _commit(dataset: dict[str, object]) -> object:
    return dataset.get("commit") or dataset.get("revision")


def _statistics(shards: ShardSet, side: str) -> list[tuple[str, str]]:
    quantiles = shards.norm_quantiles(side)
    stats = shards.stats(side)
    n_sinks, n_rows = 0, 0
    for shard in range(shards.train.n_shards):
        norms = shards.row_norms(side, shard)[shards.train.keep(shard)]
        n_sinks += int((norms > SINK_NORM * quantiles[0.5]).sum())
        n_rows += len(norms)
    largest = max(record.largest[side] for record in shards.records)
    ratio = float(stats.mean.norm() / stats.variance.sum().sqrt())
    fits = "fits float16" if largest < FP16_LIMIT else "too large for float16"
    shown = ", ".join(f"{level:g}: {quantiles[level]:.4g}" for level in (0.01, 0.5, 0.99, 1.0))
    return [
        (f"{side}: row norm quantiles", shown),
        (f"{side}: sink rows (> {SINK_NORM:g}x median)", f"{n_sinks / n_rows:.3%}"),
        (f"{side}: ||mean|| / ||std||", f"{ratio:.3f}"),
        (f"{side}: largest |x|", f"{largest:.5g} ({fits})"),
    ]
