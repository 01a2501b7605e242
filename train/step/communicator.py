"""What a step asks of the ranks that take it together. `TrainStep` is one; who takes part is handed to it.

    Communicator      alone: this process has every row and every latent, and asks nobody
    RowsOverRanks     each rank has its rows of every batch (distributed/rows_over_ranks.py)
    LatentsOverRanks  each rank has its latents of the dictionary (distributed/latents_over_ranks.py)

Every rank must take the same steps, so that all make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gradients import Gradients
from .nested_loss import total_scatter
from .sparse_acts import SparseActs


class Communicator:
    """A process alone, and the questions that others answer together."""

    row_parts = 1
    """Ranks that a batch is spread over; each has as many rows."""
    latents: range | None = None
    """The latents of this rank, as numbers in the whole dictionary; None for all."""
    common: tuple[str, ...] = ()
    """Where latents are spread: trained tensors that every rank holds whole."""

    def sum_over_rows(self, part: Tensor) -> Tensor:
        """The sum of what each rank found for its rows; may be in place."""
        return part

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """The sum of what each rank found for its latents; may be in place."""
        return part

    def smallest(self, part: Tensor) -> Tensor:
        """The smallest of all ranks' values, elementwise; may be in place."""
        return part

    def is_finite(self, x: Tensor) -> Tensor:
        """Whether the whole batch is finite, 0-d bool; x [rows, d_in]."""
        return torch.isfinite(x.sum())

    def total_scatter(self, values: Tensor) -> Tensor:
        """sum over the whole batch of ||v - mean(v)||^2, 0-d; values [rows, d]."""
        return total_scatter(values)

    def residual_scatter(self, residual: Tensor) -> Tensor:
        """var(r) * rows of this rank, with the variance of the whole batch, 0-d fp32; residual [rows, d_out]."""
        return self.total_scatter(residual)

    def largest(self, select: Callable[[int], SparseActs], n: int, batch: int, *, fixed_shapes: bool) -> SparseActs:  # noqa: ARG002
        """This rank's entries that are among the `n` largest of the whole batch and dictionary.

        select(n) -> the n largest of this rank's `batch` rows and latents; with `fixed_shapes` no shape depends on
        the data.
        """
        return select(n)

    def largest_of_rows(self, own: SparseActs, batch: int, k: int) -> SparseActs:  # noqa: ARG002
        """Of `own`, which has as many entries for each of `batch` rows, in row order, those that are among the `k`
        largest of their row in the whole dictionary."""
        return own

    def gradients(self, own: Gradients) -> Gradients:
        """The gradients of the whole batch, from those of this rank's rows."""
        return own
