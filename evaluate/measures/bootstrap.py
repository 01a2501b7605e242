"""95% intervals by drawing units with replacement: documents, or words where a score is of words.

Rows of one document are not independent of each other, nor are its contexts: neighbouring contexts are about the same
things. So a draw takes whole documents (a cluster bootstrap; Field & Welsh 2007, Bootstrapping clustered data).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LEVEL = 0.95
DOCUMENTS = {"bootstrap_unit": "document"}
"""In the settings of a result; results made earlier drew contexts, and are made anew."""
_DRAWN_AT_ONCE = 2**22
"""Units drawn at once, 8 bytes each: memory stays the same however many documents and draws there are."""

Interval = tuple[float, float]


def resampled(
    sums: Float[Tensor, "units columns"], n_draws: int, generator: torch.Generator
) -> Float[Tensor, "n_draws columns"] | None:
    """What each column sums up to in each draw of as many units as there are (Efron & Tibshirani 1993, chapter 13).

    Generators with equal seeds draw equal units, so that draws pair. None with fewer than two units or no draws.
    """
    if len(sums) < 2 or n_draws == 0:
        return None
    return torch.cat([weights @ sums for weights in _weights(len(sums), n_draws, generator)])


def central(values: Float[Tensor, "n_draws columns"]) -> tuple[Interval, ...]:
    """(low, high) of the central share LEVEL of each column."""
    tail = (1 - LEVEL) / 2
    bounds = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return tuple((float(low), float(high)) for low, high in bounds.T)


def mean_over_classes(
    values: list[np.ndarray], words: list[np.ndarray], n_draws: int, seed: int
) -> tuple[float, Interval | None]:
    """The mean over classes of the mean of each class's rows, and its interval by drawing words.

    `values` [rows] and `words` [rows] int64 are given for each class. In a draw each class takes as many of its words
    as it has, with replacement, and divides the sum over their rows by the number of those rows. No interval without
    draws or when no class has two words.
    """
    point = float(np.mean([np.mean(rows, dtype=np.float64) for rows in values]))
    if n_draws == 0 or max(len(np.unique(rows)) for rows in words) < 2:
        return point, None
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(n_draws, dtype=torch.float64)
    for rows, names in zip(values, words, strict=True):
        _, word = np.unique(names, return_inverse=True)
        sums = torch.from_numpy(np.stack([np.bincount(word, rows.astype(np.float64)), np.bincount(word)], 1))
        drawn = resampled(sums, n_draws, generator)
        # The only word of a class is in every draw.
        sum_and_count = sums if drawn is None else drawn
        means += sum_and_count[:, 0] / sum_and_count[:, 1]
    return point, central(means[:, None] / len(values))[0]


def _weights(n_units: int, n_draws: int, generator: torch.Generator) -> Iterator[Float[Tensor, "draws n_units"]]:
    """How often each unit is in each draw, float64, some draws at a time."""
    at_once = max(1, _DRAWN_AT_ONCE // n_units)
    for start in range(0, n_draws, at_once):
        drawn = torch.randint(n_units, (min(at_once, n_draws - start), n_units), generator=generator)
        weights = torch.zeros(drawn.shape, dtype=torch.float64)
        yield weights.scatter_add_(1, drawn, torch.ones_like(weights))
