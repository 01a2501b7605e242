"""When a text turns out to be shorter than was asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harvest.enough_text import noting_the_end
from harvest.packing import ShardJob
from matryoshka.shards import SplitPlan

PLANS = {
    "val": SplitPlan(contexts=4, chunk_positions=2, shard_contexts=(4, 4, 1)),
    "train": SplitPlan(contexts=5, chunk_positions=2, shard_contexts=(5, 5)),
}


@pytest.mark.parametrize(
    ("val", "train", "when", "what"),
    [
        ((4, 4, 1), (5, 5), None, ""),
        ((4, 3), (5,), ("val", 1), "val has 7 of the 9 contexts"),
        ((4, 4), (5,), ("train", 0), "val has 8 of the 9 contexts"),
        ((4, 4, 1), (5, 2), ("train", 1), "train has 7 of the 10 contexts"),
        ((4, 4, 1), (5,), ("the end", 0), "train has 5 of the 10 contexts"),
    ],
)
def test_it_is_said_once_and_before_the_shard_at_which_it_is_known(
    val: tuple[int, ...], train: tuple[int, ...], when: tuple[str, int] | None, what: str
) -> None:
    said: list[str] = []

    def jobs() -> Iterator[ShardJob]:
        for split, sizes in (("val", val), ("train", train)):
            for shard, size in enumerate(sizes):
                yield ShardJob(split, shard, torch.zeros(size, 6), torch.zeros(size, 6))

    known = None
    for job in noting_the_end(jobs(), PLANS, said.append):
        if said and known is None:
            known = (job.split, job.shard)
    assert (known or (("the end", 0) if said else None)) == when
    assert len(said) == (when is not None)
    assert what in "".join(said)
