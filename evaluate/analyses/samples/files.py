"""The folder samples/: samples.parquet (a row a window), histograms.parquet (a row a latent), samples.json (metadata).

samples.json is written last: where it is, the tables are whole and are what it says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka.errors import UserError
from matryoshka.runs import fsync_path

from ...result import Result
from .sampling import Sampling
from .selection import DECILE, KINDS, TOP, SampleRows, WindowTokens

SAMPLES_FOLDER = "samples"
METADATA_FILE, WINDOWS_FILE, HISTOGRAMS_FILE = "samples.json", "samples.parquet", "histograms.parquet"
LATENTS_PER_GROUP = 256
"""Latents in one row group of the Parquet file: what reading one of them costs."""


class SamplesMetadata(Result):
    """The content of samples.json."""

    FILE = f"{SAMPLES_FOLDER}/{METADATA_FILE}"
    TABLES = (WINDOWS_FILE, HISTOGRAMS_FILE)

    split: Literal["val", "train"]
    tokenizer: str
    """Name of the tokenizer: a folder, or a repository of the hub."""
    n_rows: int
    """Rows the windows are chosen from."""
    n_windows: int


@dataclass(frozen=True, slots=True)
class Window:
    """One window of one latent, as read back."""

    latent: int
    kind: str
    decile: int | None
    rank: int
    context: int
    position: int
    doc_id: int
    peak: int
    """Index in `tokens` of the token the window is about."""
    act: float
    """Activation there."""
    tokens: list[int]
    acts: list[float]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Activations of one latent: counts[i] of them are in [i, i + 1) * width."""

    n_rows: int
    width: float
    counts: list[int]


def write_samples(folder: Path, sampling: Sampling, rows: SampleRows, text: WindowTokens) -> None:
    """Write the two tables; equal content gives equal bytes."""
    _write_windows(folder / WINDOWS_FILE, sampling, rows, text)
    _write_histograms(folder / HISTOGRAMS_FILE, sampling)


def read_windows(folder: Path, latent: int) -> list[Window]:
    """The windows of one latent; reads the one row group that holds them."""
    found = [window for group in _groups(folder, latent) for window in group if window.latent == latent]
    return sorted(found, key=lambda w: (KINDS.index(w.kind), -(w.decile or 0), w.rank))


def all_windows(folder: Path) -> Iterator[list[Window]]:
    """All windows in the order of the file, LATENTS_PER_GROUP latents at a time."""
    yield from _groups(folder, None)


def read_histograms(folder: Path) -> list[Histogram]:
    """One of each latent."""
    import pyarrow.parquet as pq

    columns = _readable(folder / HISTOGRAMS_FILE, pq.read_table).to_pydict()
    return [Histogram(*values) for values in zip(columns["n_rows"], columns["width"], columns["counts"], strict=True)]


def _groups(folder: Path, latent: int | None) -> Iterator[list[Window]]:
    import pyarrow.parquet as pq

    file = _readable(folder / WINDOWS_FILE, pq.ParquetFile)
    for number in range(file.num_row_groups):
        bounds = file.metadata.row_group(number).column(0).statistics
        if latent is None or bounds is None or bounds.min <= latent <= bounds.max:
            columns = file.read_row_group(number).to_pydict()
            yield [Window(*values) for values in zip(*columns.values(), strict=True)]


def _readable(path: Path, read: Any) -> Any:
    from pyarrow import ArrowInvalid

    try:
        return read(path)
    except (OSError, ArrowInvalid) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete {path.parent} and run `evaluate samples` again"
        ) from error


def _write_windows(path: Path, sampling: Sampling, rows: SampleRows, text: WindowTokens) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("latent", pa.int32()),
            ("kind", pa.string()),
            ("decile", pa.int8()),
            ("rank", pa.int16()),
            ("context", pa.int32()),
            ("position", pa.int32()),
            ("doc_id", pa.int32()),
            ("peak", pa.int16()),
            ("act", pa.float32()),
            ("tokens", pa.list_(pa.int32())),
            ("acts", pa.list_(pa.float32())),
        ]
    )
    d_sae = len(sampling.top.score)
    firsts = range(0, d_sae, LATENTS_PER_GROUP)
    bounds = torch.searchsorted(rows.latent, torch.tensor([*firsts, d_sae])).tolist()
    partial = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for start, stop in zip(bounds, bounds[1:], strict=False):
            if stop > start:
                columns = _columns(sampling, rows, text, slice(start, stop))
                writer.write_table(pa.table(columns, schema=schema), row_group_size=stop - start)
    fsync_path(partial)
    os.replace(partial, path)


def _columns(sampling: Sampling, rows: SampleRows, text: WindowTokens, span: slice) -> list[Any]:
    import pyarrow as pa

    kind, latent, slot, tokens = rows.kind[span], rows.latent[span], rows.slot[span], text.tokens[span]
    acts = torch.zeros(tokens.shape)
    for code, kept in ((TOP, sampling.top), (DECILE, sampling.sample)):
        chosen = kind == code
        device = kept.score.device
        acts[chosen] = kept.acts(latent[chosen].to(device), slot[chosen].to(device)).cpu()
    inside = tokens >= 0
    offsets = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0)).int().numpy()
    before = -int(sampling.shape.offsets()[0])
    names = pa.array(KINDS)
    return [
        pa.array(latent.int().numpy()),
        names.take(pa.array(kind.numpy())),
        pa.array(rows.decile[span].to(torch.int8).numpy(), mask=(kind != DECILE).numpy()),
        pa.array(rows.rank[span].to(torch.int16).numpy()),
        pa.array((rows.place[span] // sampling.ctx_len).int().numpy()),
        pa.array((rows.place[span] % sampling.ctx_len).int().numpy()),
        pa.array(text.doc_ids[span].numpy()),
        pa.array(inside[:, :before].sum(1).to(torch.int16).numpy()),
        pa.array(rows.value[span].numpy()),
        pa.ListArray.from_arrays(offsets, pa.array(tokens[inside].numpy())),
        pa.ListArray.from_arrays(offsets, pa.array(acts[inside].numpy())),
    ]


def _write_histograms(path: Path, sampling: Sampling) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = sampling.histogram.counts.cpu()
    offsets = torch.arange(len(counts) + 1, dtype=torch.int32) * counts.shape[1]
    columns = {
        "n_rows": pa.array(counts.sum(1).numpy()),
        "width": pa.array(sampling.histogram.widths().cpu().numpy()),
        "counts": pa.ListArray.from_arrays(offsets.numpy(), pa.array(counts.flatten().numpy())),
    }
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns), partial, compression="zstd")
    fsync_path(partial)
    os.replace(partial, path)
