"""A histogram of the activations of each latent, whose bins widen as larger activations come."""

from __future__ import annotations

import torch
from torch import Tensor

N_BINS = 64
_EMPTY_EXPONENT = -60


class ActivationHistogram:
    """Counts per bin [i, i + 1) * width, where width is the smallest power of two that lets N_BINS bins reach the
    largest activation: at least half of the bins are in use.

    Doubling a width merges pairs of bins, which loses nothing, so the result does not depend on the order.
    """

    SUMS = ("counts", "exponent")

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.counts = torch.zeros(d_sae, N_BINS, dtype=torch.int32, device=device)
        """[d_sae, N_BINS] int32"""
        self.exponent = torch.full((d_sae,), _EMPTY_EXPONENT, dtype=torch.int32, device=device)
        """[d_sae] int32: log2 of the width"""

    def add(self, latent: Tensor, value: Tensor) -> None:
        """Count positive activations `value` [n] of `latent` [n]."""
        largest = torch.zeros(len(self.exponent), device=value.device).scatter_reduce_(0, latent, value, "amax")
        # frexp: largest = m * 2^e with m in [0.5, 1), so that largest < 2^e = N_BINS * width.
        needed = torch.frexp(largest).exponent.int() - (N_BINS.bit_length() - 1)
        self._widen(torch.where(largest > 0, needed, _EMPTY_EXPONENT))
        bins = torch.ldexp(value, -self.exponent[latent]).long().clamp_max(N_BINS - 1)
        counted = torch.bincount(latent * N_BINS + bins, minlength=self.counts.numel())
        self.counts += counted.view_as(self.counts).int()

    def widths(self) -> Tensor:
        """[d_sae] float32 width of a bin."""
        return torch.ldexp(torch.ones(len(self.exponent), device=self.exponent.device), self.exponent)

    def _widen(self, needed: Tensor) -> None:
        rows = (needed > self.exponent).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        doublings = (needed[rows] - self.exponent[rows]).clamp_max(31)
        bins = torch.arange(N_BINS, device=rows.device)[None] >> doublings[:, None]
        merged = torch.zeros_like(self.counts[rows]).scatter_add_(1, bins, self.counts[rows])
        self.counts[rows], self.exponent[rows] = merged, needed[rows]
