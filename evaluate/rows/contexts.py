"""Whole contexts for a language model, and which of their positions count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.shards import ShardSet, Split


@dataclass(frozen=True, slots=True)
class Contexts:
    """Some contexts of a split; every tensor is [contexts, ctx_len]."""

    numbers: tuple[int, ...]
    """Their numbers in the split."""
    tokens: Tensor
    """int64"""
    doc_ids: Tensor
    """int64: which document each token is from."""
    replaced: Tensor
    """bool: the token is not special. Only there is the target ever changed; no transcoder was trained on the rest."""
    scored: Tensor
    """bool: it is replaced, and the next token is there, not special, and of the same document."""

    def documents(self) -> Tensor:
        """int64 [documents]: those with scored positions, ascending."""
        return self.doc_ids[self.scored].unique()

    def per_document(self, values: Tensor, where: Tensor) -> Tensor:
        """float64 [documents]: sums over the positions of each of `documents`.

        `values` [positions] in the order of `where.nonzero()`; `where` [contexts, ctx_len] marks scored positions.
        """
        documents = self.documents()
        sums = torch.zeros(len(documents), dtype=torch.float64)
        return sums.index_add_(0, torch.searchsorted(documents, self.doc_ids[where]), values.double().cpu())

    def next_tokens(self, where: Tensor) -> Tensor:
        """int64 [positions]: what the model has to predict at the scored positions that `where` marks, in order."""
        return self.tokens.roll(-1, 1)[where]


def context_batches(shards: ShardSet, split: Split, numbers: Sequence[int], batch_tokens: int) -> Iterator[Contexts]:
    """The contexts of these ascending numbers, about `batch_tokens` tokens at a time and at least one context."""
    at_once, first = max(1, batch_tokens // shards.ctx_len), 0
    for shard, n_in_shard in enumerate(split.shard_contexts):
        # A batch never spans two shards.
        in_shard = [number for number in numbers if first <= number < first + n_in_shard]
        if in_shard:
            tokens, doc_ids = split.tokens(shard), split.doc_ids(shard)
            for start in range(0, len(in_shard), at_once):
                some = tuple(in_shard[start : start + at_once])
                rows = torch.tensor(some) - first
                replaced, scored = scored_positions(tokens[rows], doc_ids[rows], shards.manifest.special_ids)
                yield Contexts(some, tokens[rows].long(), doc_ids[rows].long(), replaced, scored)
        first += n_in_shard


def scored_positions(tokens: Tensor, doc_ids: Tensor, special_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(replaced, scored) of contexts [contexts, ctx_len], as described at `Contexts`."""
    replaced = ~torch.isin(tokens, torch.tensor(special_ids, dtype=tokens.dtype))
    scored = torch.zeros_like(replaced)
    scored[:, :-1] = replaced[:, :-1] & replaced[:, 1:] & (doc_ids[:, :-1] == doc_ids[:, 1:])
    return replaced, scored
