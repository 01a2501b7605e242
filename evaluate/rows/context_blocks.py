"""Whole contexts of a split with their source activations, some at a time and in the order of the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.shards import ShardSet, Split

from .windows import Windows, WindowShape, windows_of

BLOCK_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class ContextBlock:
    """Some whole contexts of one shard."""

    first_context: int
    """Number of the first one in the split."""
    source: Tensor
    """[contexts, positions, d_in] bfloat16"""
    keep: Tensor
    """[contexts, positions] bool: False at special positions"""
    windows: Windows


def context_blocks(
    shards: ShardSet, split: Split, shape: WindowShape, n_contexts: int | None = None, first: int = 0
) -> Iterator[ContextBlock]:
    """The first `n_contexts` contexts of a split (all by default), about BLOCK_ROWS rows at a time.

    With `first`, where a block of them began, the contexts before it are skipped.
    """
    limit = split.n_contexts if n_contexts is None else n_contexts
    at_once, first_context = max(1, BLOCK_ROWS // shards.ctx_len), 0
    for shard, n_here in enumerate(split.shard_contexts):
        wanted = min(n_here, limit - first_context)
        if wanted <= 0:
            return
        if first_context + n_here <= first:
            first_context += n_here
            continue
        source = split.activations("source", shard)
        tokens, doc_ids, keep = split.tokens(shard), split.doc_ids(shard), split.keep(shard).T
        for start in range(0, wanted, at_once):
            if first_context + start < first:
                continue
            span = slice(start, min(start + at_once, wanted))
            yield ContextBlock(
                first_context=first_context + start,
                source=source[:, span].transpose(0, 1),
                keep=keep[span],
                windows=windows_of(tokens[span], doc_ids[span], shape),
            )
        first_context += n_here


def count_contexts(split: Split, rows: int | None) -> tuple[int, int]:
    """(contexts, kept rows in them): the first contexts that hold `rows` kept rows together; all by default."""
    kept = torch.cat([split.keep(shard).sum(0) for shard in range(split.n_shards)])
    total = kept.cumsum(0)
    if rows is None or rows >= int(total[-1]):
        return len(kept), int(total[-1])
    n_contexts = int(torch.searchsorted(total, rows)) + 1
    return n_contexts, int(total[n_contexts - 1])
