"""Rows of a split, in batches of one size, with where each row comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from matryoshka.shards import Block, ShardSet, Split


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Activation pairs and their origin; row r of one tensor is row r of every other."""

    source: Tensor
    """[rows, d_in] bfloat16"""
    target: Tensor
    """[rows, d_out] bfloat16"""
    tokens: Tensor
    """[rows] int32 token ids"""
    doc_ids: Tensor
    """[rows] int32"""
    positions: Tensor
    """[rows] int64, place in the context"""
    contexts: Tensor
    """[rows] int64, number of the context in its split"""

    def __len__(self) -> int:
        return len(self.tokens)


def count_rows(shards: ShardSet, split: str, limit: int | None = None) -> int:
    """Rows that `row_batches` will give: all that are not special, or `limit` when there are more."""
    available = sum(record.n_rows for record in shards.records if record.split == split)
    return available if limit is None else min(limit, available)


def row_batches(split: Split, batch_rows: int, limit: int | None = None) -> Iterator[RowBatch]:
    """Batches of exactly `batch_rows` rows (the last one may be smaller) in the order of the disk.

    Special positions are left out. With `limit`, only the first `limit` kept rows in reading order are given (context
    after context, position after position), so that no position is favoured; they still come in the order of the disk.
    """
    pending: list[RowBatch] = []
    for rows in _block_rows(split, limit):
        pending.append(rows)
        while sum(map(len, pending)) >= batch_rows:
            joined = _joined(pending)
            yield _slice(joined, 0, batch_rows)
            pending = [_slice(joined, batch_rows, len(joined))]
    rest = _joined(pending) if pending else None
    if rest is not None and len(rest) > 0:
        yield rest


def _block_rows(split: Split, limit: int | None) -> Iterator[RowBatch]:
    """The wanted rows of each block."""
    shard, first_context, wanted, remaining = -1, 0, torch.zeros(0), limit
    for block in split.blocks():
        if block.shard != shard:
            if remaining is not None and shard >= 0:
                remaining -= int(wanted.sum())
            if remaining == 0:
                return
            first_context = sum(split.shard_contexts[: block.shard])
            shard, wanted = block.shard, _first_rows(split.keep(block.shard), remaining)
        here = wanted[block.first_position : block.first_position + block.keep.shape[0]]
        if bool(here.any()):
            yield _rows(block, here, first_context)


def _first_rows(keep: Tensor, limit: int | None) -> Tensor:
    """`keep` [positions, contexts] cut to its first `limit` rows, context after context."""
    if limit is None:
        return keep
    place = keep.T.flatten().cumsum(0).view(keep.T.shape).T
    return keep & (place <= limit)


def _rows(block: Block, wanted: Tensor, first_context: int) -> RowBatch:
    positions, contexts = wanted.nonzero(as_tuple=True)
    return RowBatch(
        source=block.source[wanted],
        target=block.target[wanted],
        tokens=block.tokens[wanted],
        doc_ids=block.doc_ids[wanted],
        positions=positions + block.first_position,
        contexts=contexts + first_context,
    )


def _joined(batches: list[RowBatch]) -> RowBatch:
    if len(batches) == 1:
        return batches[0]
    return RowBatch(**{f.name: torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(RowBatch)})


def _slice(batch: RowBatch, start: int, stop: int) -> RowBatch:
    return RowBatch(**{f.name: getattr(batch, f.name)[start:stop] for f in fields(RowBatch)})
