"""Rows of a split, in batches of one size, with where each row comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import Block, ShardSet, Split
from matryoshka.transcoder import Transcoder


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


def check_rows(shards: ShardSet, split: str) -> None:
    """Raise UserError for a split without any row to measure on."""
    if count_rows(shards, split) == 0:
        raise UserError(f"the {split} split of {shards.path} holds only special tokens; harvest more text")


def documents_of(split: Split, limit: int | None = None) -> Tensor:
    """Numbers of the documents that the rows of `row_batches` are from, int64 [documents], ascending.

    A document may be in several contexts and shards; it is there once.
    """
    found, remaining = [torch.zeros(0, dtype=torch.int32)], limit
    for shard in range(split.n_shards):
        wanted = _first_rows(split.keep(shard), remaining)
        found.append(split.doc_ids(shard).T[wanted].unique())
        if remaining is not None:
            remaining -= int(wanted.sum())
            if remaining == 0:
                break
    return torch.cat(found).unique().long()


def row_batches(split: Split, batch_rows: int, limit: int | None = None, start: int = 0) -> Iterator[RowBatch]:
    """Batches of exactly `batch_rows` rows (the last one may be smaller) in the order of the disk.

    Special positions are left out. With `limit`, only the first `limit` kept rows in reading order are given (context
    after context, position after position), so that no position is favoured; they still come in the order of the disk.
    The first `start` rows of that order are skipped, and chunks wholly among them are not read.
    """
    pending: list[RowBatch] = []
    for rows in _block_rows(split, limit, start):
        pending.append(rows)
        if sum(map(len, pending)) < batch_rows:
            continue
        joined = _joined(pending)
        whole = len(joined) - len(joined) % batch_rows
        for first in range(0, whole, batch_rows):
            yield _slice(joined, first, first + batch_rows)
        pending = [_slice(joined, whole, len(joined))]
    rest = _joined(pending) if pending else None
    if rest is not None and len(rest) > 0:
        yield rest


def _block_rows(split: Split, limit: int | None, start: int) -> Iterator[RowBatch]:
    """The wanted rows of each chunk of positions of each shard."""
    remaining, to_skip, first_context = limit, start, 0
    for shard, n_contexts in enumerate(split.shard_contexts):
        wanted = _first_rows(split.keep(shard), remaining)
        tokens, doc_ids = split.tokens(shard).T, split.doc_ids(shard).T
        for first in range(0, len(wanted), split.chunk_positions):
            keep_chunk = wanted[first : first + split.chunk_positions]
            n_here = int(keep_chunk.sum())
            if n_here <= to_skip:
                to_skip -= n_here
                continue
            stop = first + len(keep_chunk)
            block = Block(
                split=split.name,
                shard=shard,
                first_position=first,
                tokens=tokens[first:stop],
                doc_ids=doc_ids[first:stop],
                source=split.activations("source", shard, first, stop),
                target=split.activations("target", shard, first, stop),
                keep=keep_chunk,
            )
            rows = _rows(block, first_context)
            yield _slice(rows, to_skip, n_here) if to_skip else rows
            to_skip = 0
        if remaining is not None:
            remaining -= int(wanted.sum())
            if remaining == 0:
                return
        first_context += n_contexts


def _first_rows(keep: Tensor, limit: int | None) -> Tensor:
    """`keep` [positions, contexts] cut to its first `limit` rows, context after context."""
    if limit is None:
        return keep
    rank = keep.T.flatten().cumsum(0).view(keep.T.shape).T
    return keep & (rank <= limit)


def _rows(block: Block, first_context: int) -> RowBatch:
    """The rows that `block.keep` marks."""
    positions, contexts = block.keep.nonzero(as_tuple=True)
    # Looked up once: indexing with the mask would look it up for each tensor.
    indices = positions * block.keep.shape[1] + contexts

    def chosen(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1).index_select(0, indices)

    return RowBatch(
        source=chosen(block.source),
        target=chosen(block.target),
        tokens=chosen(block.tokens),
        doc_ids=chosen(block.doc_ids),
        positions=positions + block.first_position,
        contexts=contexts + first_context,
    )


def input_and_target(transcoder: Transcoder, shards: ShardSet, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """(x [rows, d_in] in the input convention of the transcoder, y [rows, d_out] float32) on its device."""
    x = apply_convention(
        batch.source.to(transcoder.device),
        transcoder.config.input,
        source_site=shards.manifest.source.site,
        norm=shards.norm,
    )
    return x, batch.target.to(transcoder.device).float()


def _joined(batches: list[RowBatch]) -> RowBatch:
    if len(batches) == 1:
        return batches[0]
    return RowBatch(**{f.name: torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(RowBatch)})


def _slice(batch: RowBatch, start: int, stop: int) -> RowBatch:
    return RowBatch(**{f.name: getattr(batch, f.name)[start:stop] for f in fields(RowBatch)})
