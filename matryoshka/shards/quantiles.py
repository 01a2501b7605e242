"""Exact quantiles of more numbers than fit into memory, in two passes.

The bits of non-negative float32 numbers, read as whole numbers, are in the same order as the numbers. So one pass
counts the upper 16 bits, which tells for each wanted rank the bin that it falls into; a second counts the lower 16 bits
of the numbers in those bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

_BINS = 1 << 16


def quantiles(pieces: Callable[[], Iterable[np.ndarray]], levels: Sequence[float]) -> list[float]:
    """Quantiles at `levels` of all the float32 numbers (non-negative, finite) that `pieces` yields, twice the same.

    Between two numbers they are interpolated linearly, as by `np.quantile`.
    """
    upper = np.zeros(_BINS, np.int64)
    for piece in pieces():
        upper += np.bincount(_bits(piece) >> 16, minlength=_BINS)
    n = int(upper.sum())
    assert n > 0
    places = [level * (n - 1) for level in levels]
    ranks = sorted({int(edge(place)) for place in places for edge in (np.floor, np.ceil)})
    ends = np.cumsum(upper)
    bins = {int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    lower = {b: np.zeros(_BINS, np.int64) for b in bins}
    for piece in pieces():
        bits = _bits(piece)
        tops = bits >> 16
        for b, counts in lower.items():
            counts += np.bincount(bits[tops == b] & (_BINS - 1), minlength=_BINS)
    values = {}
    for rank in ranks:
        b = int(np.searchsorted(ends, rank, side="right"))
        before = int(ends[b] - upper[b])
        low = int(np.searchsorted(np.cumsum(lower[b]), rank - before, side="right"))
        values[rank] = float(np.array([(b << 16) | low], np.uint32).view(np.float32)[0])
    return [_between(values[int(np.floor(p))], values[int(np.ceil(p))], p - np.floor(p)) for p in places]


def _bits(piece: np.ndarray) -> np.ndarray:
    assert piece.dtype == np.float32
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint32).astype(np.int64)


def _between(low: float, high: float, share: float) -> float:
    # numpy's own two forms: exact at both ends
    return float(high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share)
