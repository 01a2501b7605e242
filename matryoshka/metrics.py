"""Metrics as sums: add batches, merge partial results, divide once. All in float64.

Dividing per batch and averaging the ratios gives another, wrong number (0.0734 against 0.0612 in a measured case),
so no class here holds a ratio until `value` is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROUNDING = 1e-12
"""What float64 may leave of sum(y^2) - n mean(y)^2 when y does not vary at all, relative to sum(y^2)."""


def float64(values: Tensor) -> Tensor:
    """`values` in float64, where they are if that device has it: MPS does not, and gets them on the CPU."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


@dataclass
class FvuSums:
    """Fraction of variance unexplained, for each nested prefix.

    FVU_i = sum_rows ||y - y_hat_i||^2 / sum_rows ||y - mean(y)||^2, the mean taken over every row that was added.
    The denominator is the sum over dimensions of each one's own variance, never the variance about a grand mean.
    """

    n_rows: int = 0
    sq_err: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[n_prefixes]: summed squared error of each prefix."""
    sum_y: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[d_out]"""
    sum_y_sq: float = 0.0

    def add(self, y: Tensor, sq_err: Tensor) -> None:
        """Add a batch: targets `y` [rows, d_out] and squared errors `sq_err` [n_prefixes, rows]."""
        assert sq_err.shape[1] == y.shape[0]
        y = float64(y)
        self._grow(sq_err.shape[0], y.shape[1])
        self.n_rows += y.shape[0]
        self.sq_err += float64(sq_err).sum(1).cpu()
        self.sum_y += y.sum(0).cpu()
        self.sum_y_sq += float(y.square().sum())

    def merge(self, other: FvuSums) -> None:
        """Add what another pass over other rows has summed."""
        if other.n_rows == 0:
            return
        self._grow(len(other.sq_err), len(other.sum_y))
        self.n_rows += other.n_rows
        self.sq_err += other.sq_err
        self.sum_y += other.sum_y
        self.sum_y_sq += other.sum_y_sq

    def total_variance(self) -> float:
        """sum_rows ||y - mean(y)||^2."""
        if self.n_rows == 0:
            return float("nan")
        return self.sum_y_sq - float(self.sum_y @ self.sum_y) / self.n_rows

    def value(self) -> list[float]:
        """FVU of each prefix; NaN when the targets do not vary or no row was added."""
        total = self.total_variance()
        if not total > _ROUNDING * self.sum_y_sq:
            return [float("nan")] * len(self.sq_err)
        return (self.sq_err / total).tolist()

    def _grow(self, n_prefixes: int, d_out: int) -> None:
        if self.n_rows == 0 and len(self.sq_err) == 0:
            self.sq_err = torch.zeros(n_prefixes, dtype=torch.float64)
            self.sum_y = torch.zeros(d_out, dtype=torch.float64)
        assert len(self.sq_err) == n_prefixes
        assert len(self.sum_y) == d_out


@dataclass
class MeanSums:
    """Means of several per-row quantities at once, for example L0 or cosine of each prefix."""

    n_rows: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[n_quantities]"""

    def add(self, values: Tensor) -> None:
        """Add `values` [n_quantities, rows]."""
        if self.n_rows == 0 and len(self.total) == 0:
            self.total = torch.zeros(values.shape[0], dtype=torch.float64)
        # Torch would stretch a single quantity over several without a word.
        assert len(self.total) == values.shape[0]
        self.n_rows += values.shape[1]
        self.total += float64(values).sum(1).cpu()

    def merge(self, other: MeanSums) -> None:
        """Add what another pass over other rows has summed."""
        if other.n_rows == 0:
            return
        if self.n_rows == 0:
            self.total = torch.zeros_like(other.total)
        assert len(self.total) == len(other.total)
        self.total = self.total + other.total
        self.n_rows += other.n_rows

    def value(self) -> list[float]:
        """The means; NaN when no row was added."""
        if self.n_rows == 0:
            return [float("nan")] * len(self.total)
        return (self.total / self.n_rows).tolist()


class L0Sums(MeanSums):
    """L0 of each prefix: mean number of latents with a non-zero activation in a row."""


class CosineSums(MeanSums):
    """Mean over rows of cos(y, y_hat_i) for each prefix."""


@dataclass
class NormRatioSums:
    """Length of the reconstructions over that of the targets: sum_rows ||y_hat_i|| / sum_rows ||y|| for each prefix."""

    n_rows: int = 0
    sum_y_hat: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[n_prefixes]: summed length of each prefix's reconstruction."""
    sum_y: float = 0.0

    def add(self, y_norm: Tensor, y_hat_norm: Tensor) -> None:
        """Add a batch: lengths `y_norm` [rows] of the targets and `y_hat_norm` [n_prefixes, rows]."""
        if len(self.sum_y_hat) == 0:
            self.sum_y_hat = torch.zeros(y_hat_norm.shape[0], dtype=torch.float64)
        self.n_rows += y_norm.shape[0]
        self.sum_y_hat += float64(y_hat_norm).sum(1).cpu()
        self.sum_y += float(float64(y_norm).sum())

    def merge(self, other: NormRatioSums) -> None:
        """Add what another pass over other rows has summed."""
        if other.n_rows == 0:
            return
        self.sum_y_hat = other.sum_y_hat.clone() if self.n_rows == 0 else self.sum_y_hat + other.sum_y_hat
        self.sum_y += other.sum_y
        self.n_rows += other.n_rows

    def value(self) -> list[float]:
        """The ratios; NaN when every target is zero or no row was added."""
        if not self.sum_y > 0:
            return [float("nan")] * len(self.sum_y_hat)
        return (self.sum_y_hat / self.sum_y).tolist()


@dataclass
class FiringCounts:
    """How often each latent fires: density_i = rows where latent i is non-zero / rows."""

    d_sae: int
    n_rows: int = 0
    counts: Tensor = field(init=False)
    """[d_sae] int64"""

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.d_sae, dtype=torch.int64)

    def add(self, acts: Tensor) -> None:
        """Add activations [rows, d_sae]."""
        self.n_rows += acts.shape[0]
        self.counts += (acts != 0).sum(0).cpu()

    def add_active(self, latents: Tensor, n_rows: int) -> None:
        """Add the non-zero activations of `n_rows` rows, given as the latent of each, int64 [n_active]."""
        self.n_rows += n_rows
        self.counts += torch.bincount(latents, minlength=self.d_sae).cpu()

    def merge(self, other: FiringCounts) -> None:
        """Add what another pass over other rows has counted."""
        assert self.d_sae == other.d_sae
        self.n_rows += other.n_rows
        self.counts += other.counts

    def density(self) -> Tensor:
        """[d_sae] float64 share of rows in which each latent fires."""
        return self.counts.double() / max(self.n_rows, 1)

    def dead_share(self, start: int = 0, end: int | None = None) -> float:
        """Share of the latents [start, end) that never fired."""
        return float((self.counts[start:end] == 0).double().mean())
