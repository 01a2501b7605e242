"""The aux loss's entries: in each row the k_aux largest PRE-activations of dead latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm import gemm, low_copy
from .selection import TILE_ELEMENTS
from .sparse_acts import SparseActs

WIDE_ELEMENTS = 1 << 27
"""Pre-activations of dead latents at once where they become a matrix (a GPU, or the dense backend), 512 MiB."""


def select_dead(x: Tensor, W_enc: Tensor, b_enc: Tensor, dead: Tensor, k_aux: int) -> SparseActs:
    """Entries in row order, min(k_aux, n_dead) a row; acts may be negative. dead: int64 [n_dead] latent indices.

    Works through the dead latents in tiles with a running top-k, so that memory does not grow with their number.
    """
    best, positions = _largest(x, dead, k_aux, TILE_ELEMENTS, lambda part: torch.addmm(b_enc[part], x, W_enc[part].t()))
    return SparseActs(_rows(best), dead[positions].int(), best.view(-1))


def select_listed(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, listed: Tensor, k_aux: int, *, low: torch.dtype | None
) -> SparseActs:
    """The same for a GPU and the dense backend: a list of dead latents, on a GPU of fixed length, filled up with -1.

    Always min(k_aux, length) entries a row. `latents` are positions in the list; surplus entries, of padding, are not
    `selected` and carry acts 0.
    """
    operand = low_copy(x, low)

    def encode(part: Tensor) -> Tensor:
        latents = part.clamp_min(0)
        pre = gemm(operand, low_copy(W_enc[latents], low).t()).add_(b_enc[latents])
        return pre.masked_fill_(part < 0, -torch.inf)

    best, positions = _largest(x, listed, k_aux, WIDE_ELEMENTS, encode)
    acts = best.view(-1)
    selected = acts > -torch.inf
    return SparseActs(_rows(best), positions.int(), torch.where(selected, acts, 0.0), selected)


def list_dead(is_dead: Tensor, capacity: int) -> Tensor:
    """int64 [capacity]: the dead latents, of which there are no more than that, then -1. is_dead: bool [d_sae]."""
    return torch.nonzero_static(is_dead, size=capacity, fill_value=-1).squeeze(1)


def _largest(
    x: Tensor, listed: Tensor, k_aux: int, n_elements: int, encode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The k_aux largest pre-activations of each row, [batch, k], and their positions in the list, int64 [batch * k];
    encode(part of the list) -> pre-activations [batch, part]."""
    k = min(k_aux, listed.shape[0])
    width = max(k, n_elements // x.shape[0])
    best, positions, start = x.new_empty(x.shape[0], 0), listed.new_empty(x.shape[0], 0), 0
    for part in listed.split(width):
        pre, n_held = encode(part), best.shape[1]
        if n_held:
            pre = torch.cat([best, pre], dim=1)
        top = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
        new = top.indices + (start - n_held)
        if n_held:
            held = positions.gather(1, top.indices.clamp_max(n_held - 1))
            new = torch.where(top.indices < n_held, held, new)
        best, positions, start = top.values, new, start + part.shape[0]
    return best, positions.view(-1)


def _rows(best: Tensor) -> Tensor:
    return torch.arange(best.shape[0], dtype=torch.int32, device=best.device).repeat_interleave(best.shape[1])


@dataclass(frozen=True, slots=True)
class DeadBlock:
    """The dead latents' entries as a matrix [batch, length of the list]: few latents, of which each row has many.

    latents: int64 [length], padding -1; acts: fp32, 0 where not chosen; chosen: bool. `low`: the type of operands.
    """

    latents: Tensor
    acts: Tensor
    chosen: Tensor
    low: torch.dtype | None

    @classmethod
    def of(cls, kept: SparseActs, listed: Tensor, batch: int, low: torch.dtype | None) -> DeadBlock:
        """From entries whose `latents` are positions in the list."""
        where = kept.rows.long() * listed.shape[0] + kept.latents
        size = batch * listed.shape[0]
        acts = kept.acts.new_zeros(size).scatter_(0, where, kept.acts)
        selected = torch.ones_like(where, dtype=torch.bool) if kept.selected is None else kept.selected
        chosen = torch.zeros(size, dtype=torch.bool, device=acts.device).scatter_(0, where, selected)
        return cls(listed, acts.view(batch, -1), chosen.view(batch, -1), low)

    def decode_(self, W_dec: Tensor, plane: Tensor) -> None:
        """Write acts @ W_dec[latents] to `plane` [batch, d_out]."""
        gemm(low_copy(self.acts, self.low), low_copy(W_dec[self.latents.clamp_min(0)], self.low), plane)

    def gradients(self, x: Tensor, W_dec: Tensor, d_plane: Tensor) -> BlockGradients:
        """Gradients of the listed latents' weights, given that of `plane`."""
        rows, d_plane = low_copy(W_dec[self.latents.clamp_min(0)], self.low), low_copy(d_plane, self.low)
        d_acts = gemm(d_plane, rows.t()).masked_fill_(~self.chosen, 0.0)
        return BlockGradients(
            self.latents.clamp_min(0),
            W_enc=gemm(low_copy(d_acts, self.low).t(), low_copy(x, self.low)),
            W_dec=gemm(low_copy(self.acts, self.low).t(), d_plane),
            b_enc=d_acts.sum(0),
            decoder_dot=(self.acts * d_acts).sum(0),
        )


@dataclass(frozen=True, slots=True)
class BlockGradients:
    """Gradients of the listed latents, [length, ...]; those of padding are 0."""

    latents: Tensor
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    decoder_dot: Tensor

    def add_to(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """Add the part named so, in place, to the gradients of latents from `start` on."""
        own, end = getattr(self, name), start + rows.shape[0]
        inside = (self.latents >= start) & (self.latents < end)
        own = torch.where(inside if own.ndim == 1 else inside[:, None], own, 0.0)
        return rows.index_add_(0, torch.where(inside, self.latents - start, 0), own)
