"""FVU of parts of the rows: by position, by token frequency, by document; and of drawn parts.

    FVU_s = sum_{rows in s} ||y - y_hat||^2 / sum_{rows in s} ||y - mean(y)||^2        mean(y) over ALL rows

With the mean of all rows in every denominator the parts add up: the total FVU is their average, weighted by variance.
The denominator is sum ||y||^2 - 2 mean . sum y + n ||mean||^2, so a sum of y is kept for each part.

In a draw of parts the denominator is about the mean of ALL rows too: about the draw's own mean it would be smaller by
the spread between the parts / n_parts, and every interval shifted upwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .bootstrap import resampled


@dataclass
class StrataSums:
    """Sums of each of `n_strata` parts, float64, on the CPU; memory is n_strata * d_out * 8 bytes."""

    n_strata: int
    n_prefixes: int
    d_out: int
    n_rows: Tensor = field(init=False)
    """[n_strata]"""
    sq_err: Tensor = field(init=False)
    """[n_strata, n_prefixes]"""
    l0: Tensor = field(init=False)
    """[n_strata, n_prefixes]"""
    sum_y: Tensor = field(init=False)
    """[n_strata, d_out]"""
    sum_y_sq: Tensor = field(init=False)
    """[n_strata]"""

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.n_strata, dtype=torch.float64)
        self.n_rows, self.sum_y_sq = zeros.clone(), zeros.clone()
        self.sq_err, self.l0 = (zeros[:, None].repeat(1, self.n_prefixes) for _ in range(2))
        self.sum_y = zeros[:, None].repeat(1, self.d_out)

    def add(self, strata: Tensor, y: Float[Tensor, "rows d_out"], sq_err: Tensor, l0: Tensor) -> None:
        """Add a batch: `strata` [rows] int64 part of each row; `sq_err`, `l0` [n_prefixes, rows]."""
        self.add_columns(strata, y, row_columns(y, sq_err, l0))

    def add_columns(self, strata: Tensor, y: Float[Tensor, "rows d_out"], columns: Tensor) -> None:
        """Add a batch whose `row_columns` are there already."""
        g = self.n_prefixes
        found, counts, sum_y = _bag_sums(y, strata.to(y.device))
        sums = torch.zeros(self.n_strata, columns.shape[1], dtype=torch.float64).index_add_(0, strata.cpu(), columns)
        self.n_rows[found] += counts
        self.sum_y[found] += sum_y
        self.sq_err += sums[:, :g]
        self.l0 += sums[:, g : 2 * g]
        self.sum_y_sq += sums[:, 2 * g]

    def variance(self) -> Float[Tensor, " n_strata"]:
        """sum over the rows of each part of ||y - mean(y)||^2, the mean taken over the rows of all parts."""
        mean = self.sum_y.sum(0) / self.n_rows.sum()
        return (self.sum_y_sq - 2 * self.sum_y @ mean + self.n_rows * mean.square().sum()).clamp_min(0)

    def fvu(self) -> Float[Tensor, "n_strata n_prefixes"]:
        """FVU of each part and prefix; NaN where a part has no rows or no variance."""
        variance = self.variance()[:, None]
        return torch.where(variance > 0, self.sq_err / variance, float("nan"))

    def mean_l0(self) -> Float[Tensor, "n_strata n_prefixes"]:
        """Mean L0 of each part and prefix; NaN where a part has no rows."""
        return self.l0 / self.n_rows[:, None]

    def drawn(self, n_draws: int, seed: int) -> tuple[Tensor, Tensor] | None:
        """(FVU, L0), float64 [n_draws, n_prefixes], when as many parts are drawn as have rows, with replacement.

        The seed and the parts that have rows decide which are drawn, so that draws on the same rows pair. None with
        fewer than two parts or no draws.
        """
        used, g = self.n_rows > 0, self.n_prefixes
        sums = torch.cat([self.sq_err, self.l0, self.variance()[:, None], self.n_rows[:, None]], 1)[used]
        drawn = resampled(sums, n_draws, torch.Generator().manual_seed(seed))
        if drawn is None:
            return None
        return drawn[:, :g] / drawn[:, [2 * g]], drawn[:, g : 2 * g] / drawn[:, [2 * g + 1]]


def row_columns(y: Float[Tensor, "rows d_out"], sq_err: Tensor, l0: Tensor) -> Tensor:
    """[rows, 2 * n_prefixes + 1] float64 on the CPU: squared errors, L0 and ||y||^2 of each row."""
    y_sq = y.norm(dim=1, keepdim=True).square()
    return torch.cat([sq_err.T, l0.T.to(sq_err.dtype), y_sq], 1).cpu().double()


def _bag_sums(y: Tensor, strata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(parts that occur, rows of each, float64 sum of y in each) of one batch, on the CPU.

    A sum over sorted bags and not index_add_, which is slow for wide rows on a CPU, and on a GPU adds in a different
    order each time. Within the batch it is in float32.
    """
    ordered, order = strata.sort(stable=True)
    found, counts = ordered.unique_consecutive(return_counts=True)
    starts = F.pad(counts.cumsum(0), (1, 0))
    sums = F.embedding_bag(order, y, starts, mode="sum", include_last_offset=True)
    return found.cpu(), counts.cpu(), sums.cpu().double()
