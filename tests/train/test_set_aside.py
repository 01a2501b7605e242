"""Rows for the threshold: whole contexts of train that no batch ever holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matryoshka.shards import ShardSet
from train.set_aside import SetAside
from train.stream import Stream


def contexts_of(shards: ShardSet, shard: int) -> list[Tensor]:
    """The kept source rows of each context of a train shard, one context at a time."""
    keep = shards.train.keep(shard)
    source = shards.train.activations("source", shard, 0, shards.ctx_len)
    return [source[:, context][keep[:, context]] for context in range(keep.shape[1])]


def as_keys(rows: Tensor) -> set[bytes]:
    return {row.view(torch.int16).numpy().tobytes() for row in rows}


@pytest.mark.parametrize("wanted", [1, 100, 10_000])
def test_whole_contexts_and_never_more_than_a_twentieth(random_shards: ShardSet, wanted: int) -> None:
    aside = SetAside.draw(random_shards, wanted, seed=3)
    n_train = sum(int(random_shards.train.keep(shard).sum()) for shard in range(random_shards.train.n_shards))
    slow = [
        contexts_of(random_shards, shard)[int(c)] for shard in sorted(aside.contexts) for c in aside.contexts[shard]
    ]
    assert as_keys(torch.cat(list(aside.source_rows(7)))) == as_keys(torch.cat(slow))
    assert aside.n_rows == sum(map(len, slow)) > 0
    # up to the end of a context
    assert aside.n_rows < min(wanted, n_train // 20) + random_shards.ctx_len
    for shard in range(random_shards.train.n_shards):
        chosen = aside.contexts.get(shard, torch.tensor([], dtype=torch.int64)).tolist()
        assert aside.mask(shard).nonzero().flatten().tolist() == chosen


def test_a_draw_of_its_own_for_each_seed(random_shards: ShardSet) -> None:
    drawn = [SetAside.draw(random_shards, 100, seed).contexts for seed in range(6)]
    again = SetAside.draw(random_shards, 100, 0).contexts
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in drawn[0].items()}
    assert len({str({k: v.tolist() for k, v in one.items()}) for one in drawn}) > 3


def test_no_batch_holds_a_row_that_is_set_aside(random_shards: ShardSet) -> None:
    aside = SetAside.draw(random_shards, 200, seed=3)
    kept = as_keys(torch.cat(list(aside.source_rows(50))))
    everything = Stream(random_shards, batch_rows=64, buffer_rows=300, seed=3)
    stream = Stream(random_shards, batch_rows=64, buffer_rows=300, seed=3, aside=aside)
    assert stream.n_rows == everything.n_rows - aside.n_rows
    seen: set[bytes] = set()
    for batch in stream.batches(0, 3 * stream.n_rows // 64):
        seen |= as_keys(batch.source)
    assert not seen & kept
    assert len(seen) == stream.n_rows  # and all the others come
