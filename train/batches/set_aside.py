"""Train rows that no run is trained on: the inference threshold is set on them, and L0 on val stays a measurement.

Whole contexts from a few shards: a chunk holds a few positions of every context of its shard, so one context costs the
reading of all of them, but the contexts of one shard are neighbours in the text. Shards are taken in a seeded order,
and of each at most an eighth of its contexts. The position of a shard in that order and which of its contexts come
first depend on the seed and its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka.shards import ShardSet

_LARGEST_SHARE = 20
"""At most 1/20 of the train rows are set aside, but always one context."""
_OF_A_SHARD = 8


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
        """Contexts with `n_rows` rows or just more, or as many as the largest share allows: a pure function of the
        set's tokens and the seed."""
        split = shards.train
        most = sum(record.n_rows for record in shards.records if record.split == "train") // _LARGEST_SHARE
        generators = [_generator(seed, shard) for shard in range(split.n_shards)]
        keys = [generator.random() for generator in generators]
        taken: dict[int, list[int]] = {}
        found = 0
        for shard in sorted(range(split.n_shards), key=keys.__getitem__):
            counts = split.keep(shard).sum(0).tolist()
            order = generators[shard].permutation(len(counts)).tolist()
            for context in order[: -(-len(counts) // _OF_A_SHARD)]:
                if found >= n_rows or (found and found + counts[context] > most):
                    return cls._of(shards, taken, found)
                taken.setdefault(shard, []).append(context)
                found += counts[context]
        return cls._of(shards, taken, found)

    @classmethod
    def _of(cls, shards: ShardSet, taken: dict[int, list[int]], n_rows: int) -> SetAside:
        return cls(shards, {shard: torch.tensor(sorted(contexts)) for shard, contexts in taken.items()}, n_rows)

    def mask(self, shard: int) -> Tensor:
        """Which contexts of a shard are set aside, bool [n_contexts]."""
        mask = torch.zeros(self.shards.train.shard_contexts[shard], dtype=torch.bool)
        if shard in self.contexts:
            mask[self.contexts[shard]] = True
        return mask

    def source_rows(self, at_once: int) -> Iterator[Tensor]:
        """The source rows that are set aside, without special positions, bfloat16 [<= at_once, d_in]."""
        split, pending, n_pending = self.shards.train, list[Tensor](), 0
        for shard in sorted(self.contexts):
            keep = split.keep(shard)[:, self.contexts[shard]]
            for start in range(0, self.shards.ctx_len, split.chunk_positions):
                stop = start + split.chunk_positions
                rows = split.activations("source", shard, start, stop)[:, self.contexts[shard]]
                pending.append(rows[keep[start:stop]])
                n_pending += len(pending[-1])
                # A chunk holds few rows of few contexts: they are joined, and encoded together.
                if n_pending >= at_once:
                    *whole, rest = torch.cat(pending).split(at_once)
                    yield from whole
                    pending, n_pending = [rest], len(rest)
        yield from torch.cat(pending).split(at_once)


def _generator(seed: int, shard: int) -> np.random.Generator:
    # 0 and 1 are the stream's own.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed & (2**64 - 1), 2, shard])))
