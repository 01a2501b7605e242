"""The latents of other transcoders that are most like those of a run, from what `evaluate match` left near it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analyses.match.result import MATCHES_FILE, MATCHING_FILE, Matching

_PAIRS = (("like", "correlation"), ("nearest", "cosine"))
"""Columns: the other latent, and how much it is like this one."""


@dataclass(frozen=True, slots=True)
class Other:
    """One transcoder that the run was matched with."""

    name: str
    layer_hook: str
    n_rows: int
    columns: dict[str, NDArray[Any]]
    """Column of _PAIRS -> [d_sae] float64 by latent; NaN where there is none."""


class Matches:
    """All of them."""

    def __init__(self, others: Sequence[Other], unread: Sequence[Path] = ()) -> None:
        self.others, self.unread = tuple(others), tuple(unread)

    @classmethod
    def near(cls, run: Path, evaluation: Path, digests: Callable[[], set[str]], d_sae: int) -> Matches:
        """Those of weights with one of `digests()`: in the folder of an evaluation, in the run, and beside it, or one
        folder below these."""
        folders = [path for top in (evaluation, run, run.parent) for path in (top, *sorted(top.glob("*/")))]
        others, unread = [], []
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            try:
                content = (folder / MATCHING_FILE).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                record = Matching.model_validate_json(content)
                own = next((i for i, side in enumerate(record.sides) if side.weights_sha256 in digests()), None)
                if own is not None and len(record.sides) == 2:
                    others.append(_other(folder, record, own, d_sae))
            except (OSError, ValueError):
                unread.append(folder)
        return cls(others, unread)

    def of(self, latent: int) -> list[list[Any]]:
        """[number of the other one, most correlated latent, correlation, nearest latent, cosine]; null where none."""
        rows = [[each.columns[name][latent] for pair in _PAIRS for name in pair] for each in self.others]
        return [
            [i, *(_plain(value, whole=column % 2 == 0) for column, value in enumerate(row))]
            for i, row in enumerate(rows)
            if not np.isnan(row).all()
        ]

    def facts(self) -> list[dict[str, Any]]:
        """What overview.js shows of the others."""
        return [{"name": each.name, "layer_hook": each.layer_hook, "n_rows": each.n_rows} for each in self.others]


def _other(folder: Path, record: Matching, own: int, d_sae: int) -> Other:
    """Raises ValueError or OSError for a table that is broken or not of these latents."""
    import pyarrow.parquet as pq

    names = [name for pair in _PAIRS for name in pair]
    try:
        table = pq.read_table(folder / MATCHES_FILE, columns=["side", "latent", *names])
        given = {name: table[name].to_numpy().astype(np.float64) for name in ("side", "latent", *names)}
    except KeyError as error:
        raise ValueError(f"no column {error}") from error
    same_side = given["side"] == own
    latents = given["latent"][same_side].astype(np.int64)
    if len(latents) and not 0 <= latents.min() <= latents.max() < d_sae:
        raise ValueError("other latents")
    columns = {name: np.full(d_sae, np.nan) for name in names}
    for name, values in columns.items():
        values[latents] = given[name][same_side]
    other = record.sides[1 - own]
    return Other(other.name, other.layer_hook, record.n_rows, columns)


def _plain(value: float, *, whole: bool) -> int | float | None:
    if np.isnan(value):
        return None
    return int(value) if whole else float(f"{value:.4g}")
