"""Sparse activations of many rows, ordered by row (CSR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka.transcoder import Transcoder

from .activations import active_latents

_TILE = 4096


@dataclass(frozen=True, slots=True)
class RowActs:
    """Activations [n_rows, n_latents] by rows: those of row r are `value[starts[r]:starts[r + 1]]`."""

    n_latents: int
    starts: Int[Tensor, " rows_and_1"]
    latent: Int[Tensor, " active"]
    value: Float[Tensor, " active"]

    @property
    def n_rows(self) -> int:
        """Rows, those without an active latent among them."""
        return len(self.starts) - 1

    def row(self) -> Int[Tensor, " active"]:
        """Row of each activation."""
        return torch.repeat_interleave(torch.arange(self.n_rows, device=self.starts.device), self.starts.diff())

    def prefix(self, end: int) -> RowActs:
        """The first `end` latents alone. Which latents fire does not depend on the others in threshold mode."""
        inside = self.latent < end
        counts = torch.bincount(self.row()[inside], minlength=self.n_rows)
        return RowActs(end, F.pad(counts.cumsum(0), (1, 0)), self.latent[inside], self.value[inside])

    def rows(self, chosen: Tensor) -> RowActs:
        """The rows that `chosen` [n_rows] bool marks."""
        inside = chosen[self.row()]
        counts = self.starts.diff()[chosen]
        return RowActs(self.n_latents, F.pad(counts.cumsum(0), (1, 0)), self.latent[inside], self.value[inside])

    def scipy(self) -> Any:
        """As a scipy.sparse.csr_array, on the CPU."""
        from scipy.sparse import csr_array

        arrays = (self.value.cpu().numpy(), self.latent.cpu().int().numpy(), self.starts.cpu().int().numpy())
        return csr_array(arrays, shape=(self.n_rows, self.n_latents))

    def dense(self, latents: Int[Tensor, " chosen"]) -> Float[Tensor, "rows chosen"]:
        """The columns of some latents."""
        column = torch.full((self.n_latents,), -1, dtype=torch.int64, device=self.latent.device)
        column[latents] = torch.arange(len(latents), device=column.device)
        index = column[self.latent]
        inside = index >= 0
        dense = torch.zeros(self.n_rows, len(latents), device=self.value.device)
        dense[self.row()[inside], index[inside]] = self.value[inside]
        return dense


def encode_rows(transcoder: Transcoder, x: Float[Tensor, "rows d_in"]) -> RowActs:
    """Activations of rows in threshold mode, on the device of the transcoder; a tile of rows at a time."""
    if len(x) == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=transcoder.device)
        return RowActs(transcoder.config.d_sae, nothing.new_zeros(1), nothing, nothing.float())
    counts, latents, values = [], [], []
    for tile in x.split(_TILE):
        active = active_latents(transcoder, tile.to(transcoder.device))
        counts.append(torch.bincount(active.row, minlength=len(tile)))
        latents.append(active.latent)
        values.append(active.value)
    starts = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    return RowActs(transcoder.config.d_sae, starts, torch.cat(latents), torch.cat(values))
