"""matching.json: how much of one transcoder another one has; matches.parquet: the match of every latent."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from matryoshka.config import Config
from matryoshka.runs import publish_bytes, publish_json

from ...subject.held_out import ValUnit

MATCHING_FILE, MATCHES_FILE = "matching.json", "matches.parquet"


@dataclass(frozen=True, slots=True)
class Best:
    """For each latent of one side the one of the other side that is most like it."""

    value: Tensor
    """[d_sae] float64; NaN where there is none"""
    other: Tensor
    """[d_sae] int64; -1 where there is none"""


class GroupMatch(Config):
    """Latents of one side; every number but the first two is over those that fired and is null without any."""

    n_latents: int
    n_alive: int
    """fired on the rows"""
    mean_max_cosine: float | None
    """mean over latents of the largest cosine with a decoder row of the other side; null where widths differ"""
    share_close_cosine: float | None
    """share whose largest cosine is at least Matching.close"""
    mean_max_correlation: float | None
    """mean over latents of the largest Pearson correlation with activations of the other side"""
    share_close_correlation: float | None
    share_mutual: float | None
    """share that is the most correlated latent of its own most correlated latent"""


class MatchingSide(Config):
    """One of the two transcoders."""

    name: str
    weights_sha256: str
    layer_hook: str
    input: str
    prefix_ends: tuple[int, ...]
    groups: tuple[GroupMatch, ...]
    total: GroupMatch


class Matching(Config):
    """The content of matching.json."""

    format_version: Literal[1] = 1
    shard_sets: tuple[str, ...]
    """of each side"""
    shard_set_digests: tuple[str, ...]
    split: Literal["val", "train"]
    val_unit: ValUnit = "block"
    """block where one of the sets holds out blocks"""
    tokens: int | None
    n_rows: int
    close: float
    sides: tuple[MatchingSide, ...]


def write_matching(folder: Path, matching: Matching, cosine: Sequence[Best], correlation: Sequence[Best]) -> Path:
    """Publish matches.parquet and then the JSON.

    Columns: side (0 or 1), latent, nearest and its cosine, like and its correlation (null where there is none).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for side, (near, like) in enumerate(zip(cosine, correlation, strict=True)):
        d_sae = len(near.value)
        columns = {"side": pa.array(torch.full((d_sae,), side, dtype=torch.int8).numpy())}
        columns["latent"] = pa.array(torch.arange(d_sae, dtype=torch.int32).numpy())
        for other, value, best in (("nearest", "cosine", near), ("like", "correlation", like)):
            missing = (best.other < 0).numpy()
            columns[other] = pa.array(best.other.int().numpy(), mask=missing)
            columns[value] = pa.array(best.value.numpy(), mask=missing)
        tables.append(pa.table(columns))
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables(tables).combine_chunks(), buffer, compression="zstd")
    publish_bytes(folder / MATCHES_FILE, buffer.getvalue())
    publish_json(folder / MATCHING_FILE, matching.model_dump(mode="json"))
    return folder / MATCHING_FILE
