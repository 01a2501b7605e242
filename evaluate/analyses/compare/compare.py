"""`evaluate compare`: transcoders of any origin on identical rows, at equal L0."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from matryoshka.config import Config
from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.runs import make_directory, publish_json

from ...analysis import Progress, Silent
from ...config import EvaluateConfig
from ...measures.bootstrap import DOCUMENTS, Interval, central
from ...measures.records import CurvePoint
from ...result import finite
from ...rows.batches import count_rows, row_batches
from ...subject.held_out import ValUnit
from ...subject.subjects import load_subject, shards_of_all
from .matched import DocumentCurve, fvu_at

COMPARISON_FILE = "comparison.json"


class Matched(Config):
    """One transcoder at one L0; null where its curve does not reach that L0."""

    l0: float
    fvu: float | None
    fvu_interval: tuple[float, float] | None
    """95%, by drawing documents with replacement; null too when some draw's curve does not reach that L0"""
    difference: float | None
    """FVU minus that of the first transcoder"""
    difference_interval: tuple[float, float] | None
    """of the difference in the same draws"""


class Entry(Config):
    """One transcoder of the comparison."""

    name: str
    weights_sha256: str
    input: str
    """the input convention it was fed"""
    d_sae: int
    l0: float
    """at its own threshold"""
    fvu: float | None
    curve: tuple[CurvePoint, ...]
    matched: tuple[Matched, ...]


class Comparison(Config):
    """The content of comparison.json."""

    format_version: Literal[1] = 1
    shard_set: str
    shard_set_digest: str
    split: Literal["val", "train"] = "val"
    val_unit: ValUnit = "block"
    settings: dict[str, Any]
    n_rows: int
    n_documents: int | None = None
    """Documents that these rows are from, which the intervals draw; null where it was made when contexts were drawn."""
    entries: tuple[Entry, ...]


def compare(texts: list[str], config: EvaluateConfig, progress: Progress | None = None) -> Comparison:
    """Measure the transcoders that `texts` name (see `load_subject`) on rows of `config.shards`, by default val ones.

    With `config.out` the result is published there too. Raises UserError for invalid input.
    """
    progress = progress or Silent()
    if config.prefix is not None:
        raise UserError(
            "a prefix in a comparison is named with its run, as data/runs/l17-k96@2 for the first two groups"
        )
    if len(texts) < 2:
        raise UserError("a comparison needs two transcoders or more; for one there is `evaluate run`")
    shards, scales = shards_of_all(texts, config.shards, progress.noted), config.compare.scales
    subjects = [load_subject(text, shards) for text in texts]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise UserError(f"two of the transcoders have the same name ({', '.join(names)}); rename a folder")
    curves, device = [], resolve_device(config.device)
    for subject in subjects:
        progress.started(subject.name, count_rows(shards, config.split, config.tokens))
        curve = DocumentCurve.empty(subject.transcoder.to(device), scales, shards, config.split, config.tokens)
        for batch in row_batches(shards.split(config.split), config.batch_rows, config.tokens):
            curve.add(batch, shards)
            progress.advanced(len(batch))
        # One transcoder at a time on the device.
        subject.transcoder.to("cpu")
        curves.append(curve)
    first_l0 = float(curves[0].points()[0][scales.index(1.0)])
    targets = config.compare.l0 or (first_l0,)
    matched = match(curves, targets, config)
    result = Comparison(
        shard_set=shards.name,
        shard_set_digest=shards.digest,
        settings={**config.content(), **DOCUMENTS, "compare": config.compare.model_dump(mode="json")},
        split=config.split,
        val_unit=shards.val_unit,
        n_rows=count_rows(shards, config.split, config.tokens),
        n_documents=len(curves[0].documents),
        entries=tuple(
            _entry(subject.name, subject.digest(), curve, rows)
            for subject, curve, rows in zip(subjects, curves, matched, strict=True)
        ),
    )
    if config.out is not None:
        make_directory(config.out)
        publish_json(config.out / COMPARISON_FILE, result.model_dump(mode="json"))
    return result


def match(curves: list[DocumentCurve], targets: tuple[float, ...], config: EvaluateConfig) -> list[tuple[Matched, ...]]:
    """Every curve at every L0 of `targets`. The draws of documents are the same for all, so that differences pair."""
    matched: list[list[Matched]] = [[] for _ in curves]
    for target in targets:
        values = [_whole(curve, target) for curve in curves]
        draws = [_drawn(curve, config.bootstrap, config.seed, target) for curve in curves]
        for rows, value, drawn in zip(matched, values, draws, strict=True):
            rows.append(
                Matched(
                    l0=target,
                    fvu=finite(float(value)),
                    fvu_interval=_interval(drawn),
                    difference=finite(float(value - values[0])),
                    difference_interval=_interval(drawn - draws[0]),
                )
            )
    return [tuple(rows) for rows in matched]


def _whole(curve: DocumentCurve, target: float) -> Tensor:
    l0, fvu = curve.points()
    return fvu_at(l0[None], fvu[None], target)[0]


def _drawn(curve: DocumentCurve, n_draws: int, seed: int, target: float) -> Tensor:
    """[n_draws] FVU at that L0; [0] where nothing can be drawn."""
    drawn = curve.sums.drawn(n_draws, seed)
    return torch.zeros(0, dtype=torch.float64) if drawn is None else fvu_at(drawn[1], drawn[0], target)


def _interval(drawn: Tensor) -> Interval | None:
    return None if len(drawn) == 0 or bool(drawn.isnan().any()) else central(drawn[:, None])[0]


def _entry(name: str, digest: str, curve: DocumentCurve, matched: tuple[Matched, ...]) -> Entry:
    l0, fvu = (points.tolist() for points in curve.points())
    own = curve.scales.index(1.0)
    return Entry(
        name=name,
        weights_sha256=digest,
        input=curve.transcoder.config.input,
        d_sae=curve.transcoder.config.d_sae,
        l0=l0[own],
        fvu=finite(fvu[own]),
        curve=tuple(
            CurvePoint(threshold_scale=scale, l0=(l0[i],), fvu=(finite(fvu[i]),))
            for i, scale in enumerate(curve.scales)
        ),
        matched=matched,
    )


def comparison_path(config: EvaluateConfig) -> Path | None:
    """Where `compare` publishes its result, if anywhere."""
    return None if config.out is None else config.out / COMPARISON_FILE
