"""Sparse activations: encode, keep what fires, decode every nested prefix from that.

About one activation in two hundred is not zero, so the cost of a pass is its encoder product. `Transcoder.encode` and
`Transcoder.nested` are the dense form of the same maths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from matryoshka.transcoder import Transcoder

TILE_BYTES = 256 * 2**20
"""Pre-activations held at once, whatever the width and the batch."""
CPU_TILE_BYTES = 16 * 2**20
"""The same on a CPU: memory that is used again and again is cheaper than new memory each time."""
CACHE_BYTES = 8 * 2**20
"""What is decoded at once on a CPU, so that it is measured while it is in the cache."""


@dataclass(frozen=True, slots=True)
class SparseActs:
    """The positive activations of a batch, ordered by row and within a row by latent."""

    n_rows: int
    row: Tensor
    """[n_active] int64"""
    latent: Tensor
    """[n_active] int64"""
    value: Tensor
    """[n_active] float32"""

    def where(self, chosen: Tensor) -> SparseActs:
        """Those that `chosen` [n_active] bool marks."""
        # Looked up once: indexing with the mask would look it up for each tensor.
        indices = chosen.nonzero().squeeze(1)
        row, latent, value = (tensor.index_select(0, indices) for tensor in (self.row, self.latent, self.value))
        return SparseActs(self.n_rows, row, latent, value)

    def every(self, first: int, step: int) -> SparseActs:
        """Those of the rows first, first + step, first + 2 step ...; they become the rows 0, 1, 2 ..."""
        chosen = self.where((self.row >= first) & ((self.row - first) % step == 0))
        return SparseActs(
            len(range(first, self.n_rows, step)), (chosen.row - first) // step, chosen.latent, chosen.value
        )

    def split(self, rows: int) -> list[SparseActs]:
        """Those of the first `rows` rows, of the next ones and so on; each counts its rows from 0."""
        firsts = torch.arange(0, self.n_rows, rows)
        ends = torch.searchsorted(self.row, torch.cat([firsts, firsts[:0].new_tensor([self.n_rows])]).to(self.row))
        parts = []
        for first, low, high in zip(firsts.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            row = self.row[low:high] - first
            parts.append(SparseActs(min(rows, self.n_rows - first), row, self.latent[low:high], self.value[low:high]))
        return parts


def rows_at_once(transcoder: Transcoder, n_rows: int) -> int:
    """Rows to decode at once: on a CPU as many as stay in the cache, else all."""
    if transcoder.device.type != "cpu":
        return max(n_rows, 1)
    return max(32, CACHE_BYTES // (4 * transcoder.config.d_out * (len(transcoder.prefix_ends) + 2)))


def active_latents(
    transcoder: Transcoder, x: Float[Tensor, "rows d_in"], floor: Float[Tensor, " d_sae"] | None = None
) -> SparseActs:
    """Pre-activations above max(floor, 0), `floor` [d_sae] being the transcoder's threshold by default.

    With the threshold these are exactly the non-zero entries of `Transcoder.encode`. Rows are taken a tile at a time,
    so that [rows, d_sae] is never held whole.
    """
    floor = (transcoder.threshold if floor is None else floor).clamp_min(0)
    parts = []
    for start, pre_acts in row_tiles(transcoder, x):
        indices = true_indices((pre_acts > floor).flatten())
        row = indices // transcoder.config.d_sae
        value = pre_acts.flatten().index_select(0, indices)
        parts.append((row + start, indices - row * transcoder.config.d_sae, value))
    row, latent, value = (torch.cat(part) for part in zip(*parts, strict=True))
    return SparseActs(n_rows=len(x), row=row, latent=latent, value=value)


def row_tiles(transcoder: Transcoder, x: Float[Tensor, "rows d_in"]) -> Iterator[tuple[int, Tensor]]:
    """(first row, pre-activations [tile, d_sae]) of as many rows at a time as TILE_BYTES allows.

    They are overwritten by the next ones: new memory for each would cost as much as a tenth of the product.
    """
    n_bytes = min(TILE_BYTES, CPU_TILE_BYTES) if transcoder.device.type == "cpu" else TILE_BYTES
    tile = max(1, n_bytes // (4 * transcoder.config.d_sae))
    x = x.to(transcoder.W_enc.dtype)
    buffer = transcoder.W_enc.new_empty(min(tile, len(x)), transcoder.config.d_sae)
    for start in range(0, len(x), tile):
        rows = x[start : start + tile]
        yield start, torch.addmm(transcoder.b_enc, rows, transcoder.W_enc, out=buffer[: len(rows)])


def true_indices(mask: Tensor) -> Tensor:
    """Where `mask` [n] is True, int64; numpy finds it on a CPU in a third of the time that torch takes."""
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def group_counts(transcoder: Transcoder, active: SparseActs) -> Tensor:
    """Active latents of each row in each group, int64 [rows, n_groups]."""
    n_groups = len(transcoder.prefix_ends)
    return torch.bincount(_bags(transcoder, active), minlength=active.n_rows * n_groups).view(active.n_rows, n_groups)


def group_sums(transcoder: Transcoder, active: SparseActs, counts: Tensor) -> Float[Tensor, "rows n_groups d_out"]:
    """What each group alone adds to the output: one bag per (row, group) sums the decoder rows that fire there.

    `counts` [rows, n_groups] is `group_counts` of the same activations.
    """
    starts = F.pad(counts.flatten().cumsum(0), (1, 0))
    return F.embedding_bag(
        active.latent,
        transcoder.W_dec,
        starts,
        per_sample_weights=active.value,
        mode="sum",
        include_last_offset=True,
    ).view(*counts.shape, transcoder.config.d_out)


def base_output(transcoder: Transcoder, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
    """The output when no latent fires: b_dec (+ x @ W_skip)."""
    if transcoder.W_skip is None:
        return transcoder.b_dec.expand(len(x), -1)
    return torch.addmm(transcoder.b_dec, x, transcoder.W_skip)


def nested_reconstructions(
    base: Float[Tensor, "rows d_out"], per_group: Float[Tensor, "rows n_groups d_out"]
) -> Iterator[Float[Tensor, "rows d_out"]]:
    """y_hat_1 ... y_hat_G, one after the other; each is overwritten by the next."""
    y_hat = base.clone()
    for group in range(per_group.shape[1]):
        y_hat += per_group[:, group]
        yield y_hat


def _bags(transcoder: Transcoder, active: SparseActs) -> Tensor:
    ends = torch.tensor(transcoder.prefix_ends, device=active.latent.device)
    return active.row * len(ends) + torch.bucketize(active.latent, ends, right=True)
