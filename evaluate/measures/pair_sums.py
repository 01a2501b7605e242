"""Sums over rows for every pair of latents, some latents at a time: exact, and never d_sae x d_sae at once.

    counts_ij = sum_rows [a_i fires] [b_j fires]                    int64
    products_ij = sum_rows a_i b_j                                  float64

About one activation in two hundred is not zero, so a row of L0 active latents has L0^2 pairs that count, and nothing
else is looked at. Memory is BLOCK_BYTES for the sums and PAIRS_AT_ONCE pairs, whatever the width and the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation_log import ActivationLog, LogPart

BLOCK_BYTES = 512 * 2**20
PAIRS_AT_ONCE = 4 * 2**20


@dataclass(frozen=True, slots=True)
class PairBlock:
    """The latents [start, start + n) of one side against all of the other."""

    start: int
    sums: Tensor
    """[n, d_other]: int64 counts or float64 products"""


def pair_counts(log: ActivationLog, d_sae: int, device: torch.device | str = "cpu") -> Iterator[PairBlock]:
    """On how many rows each two latents of one transcoder fire together; the diagonal is how often each fires."""
    for start, stop in _blocks(d_sae, d_sae):
        sums = torch.zeros((stop - start) * d_sae, dtype=torch.int64, device=device)
        for part in log.parts():
            for key, _ in _pairs(part, part, start, stop, d_sae):
                sums.index_add_(0, key.to(device), torch.ones(len(key), dtype=torch.int64, device=device))
        yield PairBlock(start, sums.view(stop - start, d_sae).cpu())


def pair_products(one: ActivationLog, other: ActivationLog, d_one: int, d_other: int) -> Iterator[PairBlock]:
    """Sums of products of activations of two transcoders on the same rows, in the same batches. On the CPU, where
    sums have one order."""
    for start, stop in _blocks(d_one, d_other):
        sums = torch.zeros((stop - start) * d_other, dtype=torch.float64)
        for part, across in zip(one.parts(), other.parts(), strict=True):
            assert len(part.per_row) == len(across.per_row)
            for key, product in _pairs(part, across, start, stop, d_other):
                sums.index_add_(0, key, product)
        yield PairBlock(start, sums.view(stop - start, d_other))


def _blocks(d_one: int, d_other: int) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK_BYTES // (8 * d_other))
    yield from ((start, min(start + size, d_one)) for start in range(0, d_one, size))


def _pairs(one: LogPart, other: LogPart, start: int, stop: int, d_other: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(place in the block, product of the activations) of every pair of activations on one row, some at a time.

    The first of a pair is one of the latents [start, stop) of `one`. Without values the products are empty.
    """
    row = torch.arange(len(one.per_row)).repeat_interleave(one.per_row)
    in_block = ((one.latent >= start) & (one.latent < stop)).nonzero().squeeze(1)
    row, latent = row[in_block], one.latent[in_block] - start
    n_partners = other.per_row[row]
    firsts = F.pad(other.per_row.cumsum(0), (1, 0))[row]
    before = F.pad(n_partners.cumsum(0), (1, 0))
    n_chunks = int(before[-1]) // PAIRS_AT_ONCE + 1
    edges = torch.searchsorted(before, torch.arange(1, n_chunks) * PAIRS_AT_ONCE).tolist()
    for low, high in zip([0, *edges], [*edges, len(in_block)], strict=True):
        n = n_partners[low:high]
        owner = torch.arange(high - low).repeat_interleave(n)
        partner = torch.arange(len(owner)) - (before[low:high] - before[low])[owner] + firsts[low:high][owner]
        key = latent[low:high][owner] * d_other + other.latent[partner]
        if one.value is None or other.value is None:
            yield key, torch.zeros(0, dtype=torch.float64)
        else:
            yield key, one.value[in_block[low:high]][owner].double() * other.value[partner].double()
