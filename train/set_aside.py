"""Train rows that no run is trained on: the inference threshold is set on them, and L0 on val stays a measurement.

Whole contexts, from as few shards as it takes: a chunk holds a few positions of every context of its shard, so one
context costs the reading of all of them. Shards are taken in a seeded order, and in each its contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka.shards import ShardSet

_LARGEST_SHARE = 20
"""At most 1/20 of the train rows are set aside, and at least one context."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """Some contexts of the train split."""

    shards: ShardSet
    contexts: dict[int, Tensor]
    """shard -> numbers of its contexts that are set aside, sorted; shards with none are left out."""
    n_rows: int
    """Their rows without special positions."""

    @classmethod
    def draw(cls, shards: ShardSet, n_rows: int, seed: int) -> SetAside:
        """Contexts with about `n_rows` rows, whole ones: a pure function of the set's tokens and the seed."""
        split = shards.train
        n_train = sum(record.n_rows for record in shards.records if record.split == "train")
        wanted = min(n_rows, n_train // _LARGEST_SHARE)
        contexts: dict[int, Tensor] = {}
        found = 0
        for shard in _permutation(split.n_shards, seed, 0):
            counts = split.keep(shard).sum(0)  # [n_contexts]
            taken: list[int] = []
            for context in _permutation(len(counts), seed, 1, shard):
                if found and found >= wanted:
                    break
                taken.append(context)
                found += int(counts[context])
            contexts[shard] = torch.tensor(sorted(taken))
            if found and found >= wanted:
                break
        return cls(shards, contexts, found)

    def mask(self, shard: int) -> Tensor:
        """Which contexts of a shard are set aside, bool [n_contexts]."""
        mask = torch.zeros(self.shards.train.keep(shard).shape[1], dtype=torch.bool)
        if shard in self.contexts:
            mask[self.contexts[shard]] = True
        return mask

    def source_rows(self, at_once: int) -> Iterator[Tensor]:
        """The source rows that are set aside, without special positions, bfloat16 [<= at_once, d_in]."""
        split = self.shards.train
        for shard in sorted(self.contexts):
            keep = split.keep(shard)[:, self.contexts[shard]]
            for start in range(0, self.shards.ctx_len, split.chunk_positions):
                stop = start + split.chunk_positions
                rows = split.activations("source", shard, start, stop)[:, self.contexts[shard]]
                yield from rows[keep[start:stop]].split(at_once)


def _permutation(n: int, seed: int, *key: int) -> list[int]:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed & (2**64 - 1), 2, *key])))
    return generator.permutation(n).tolist()
