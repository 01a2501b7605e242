"""Intervals of a mean over classes, by drawing each class's words with replacement.

Rows of one word are not independent of each other, so it is words that are drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..bootstrap import central


def mean_over_classes(
    values: list[np.ndarray], words: list[np.ndarray], n_draws: int, seed: int
) -> tuple[float, tuple[float, float] | None]:
    """The mean over classes of the mean of each class's rows, and its 95% percentile interval.

    `values` [rows] and `words` [rows] int64 are given for each class. In a draw each class takes as many of its words
    as it has, with replacement, and divides the sum over their rows by the number of those rows. None without draws or
    when no class has two words.
    """
    point = float(np.mean([np.mean(rows, dtype=np.float64) for rows in values]))
    if n_draws == 0 or max(len(np.unique(rows)) for rows in words) < 2:
        return point, None
    generator = torch.Generator().manual_seed(seed)
    draws = torch.zeros(n_draws, dtype=torch.float64)
    for rows, names in zip(values, words, strict=True):
        draws += _drawn_means(rows, names, n_draws, generator)
    ((low, high),) = central(draws[:, None] / len(values))
    return point, (low, high)


def _drawn_means(rows: np.ndarray, names: np.ndarray, n_draws: int, generator: torch.Generator) -> Tensor:
    _, word = np.unique(names, return_inverse=True)
    n_words = int(word.max()) + 1
    sums = torch.from_numpy(np.bincount(word, rows.astype(np.float64), n_words))
    counts = torch.from_numpy(np.bincount(word, minlength=n_words).astype(np.float64))
    drawn = torch.randint(n_words, (n_draws, n_words), generator=generator)
    return sums[drawn].sum(1) / counts[drawn].sum(1)
