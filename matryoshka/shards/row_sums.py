"""What the statistics of a set are made of: norms and float64 sums of the rows of one shard.

Rows are taken in blocks that stay in a core's cache, since this runs beside the language model and on a CPU takes its
cores. A block's sums do not depend on the number of threads, so neither do a set's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from matryoshka.norms import Norm

_BLOCK_VALUES = 2**17
"""1 MB in float64."""


def row_blocks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of `values` [..., width], block by block: (where they are among all rows, float32 [rows, width]).

    A block is overwritten by the next one: memory that is given back and taken anew costs more than the sums.
    """
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    buffer = torch.empty(min(step, len(rows)), rows.shape[1])
    for start in range(0, len(rows), step):
        here = slice(start, min(start + step, len(rows)))
        block = buffer[: here.stop - start]
        block.copy_(rows[here])
        yield here, block


def row_sums(values: Tensor, keep: Tensor, norm: Norm | None) -> tuple[Tensor, list[Tensor]]:
    """Row norms, and sums over the rows that are kept.

    Args:
        values: [positions, contexts, width], finite.
        keep: [positions, contexts] bool.
        norm: to sum the normalised rows too.

    Returns:
        float32 [positions, contexts]: the norm of every row.
        float64 [2, width] of the rows (sum x, sum x^2), and if there is a norm of the normalised rows.
    """
    keep = keep.reshape(-1)
    norms = torch.empty(keep.shape, dtype=torch.float32)
    sums = [_Sums(values.shape[-1]) for _ in range(1 if norm is None else 2)]
    for here, rows in row_blocks(values):
        torch.linalg.vector_norm(rows, dim=1, out=norms[here])
        kept = rows if bool(keep[here].all()) else rows[keep[here]]
        sums[0].add(kept)
        if norm is not None:
            sums[1].add(norm.normalized(kept))
    return norms.view(values.shape[:-1]), [part.totals for part in sums]


class _Sums:
    def __init__(self, width: int) -> None:
        self.totals = torch.zeros(2, width, dtype=torch.float64)
        self._exact = torch.empty(0, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        if len(rows) > len(self._exact):
            self._exact = torch.empty(rows.shape, dtype=torch.float64)
        exact = self._exact[: len(rows)]
        exact.copy_(rows)
        self.totals[0] += exact.sum(0)
        self.totals[1] += exact.square_().sum(0)
