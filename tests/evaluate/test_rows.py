"""Rows of a split in batches, against a loop over every context and position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate.rows import RowBatch, count_rows, row_batches
from matryoshka.shards import ShardSet

NAMES = {
    "source": "source",
    "target": "target",
    "tokens": "token",
    "doc_ids": "doc",
    "positions": "position",
    "contexts": "context",
}


def reading_order(batches: list[RowBatch]) -> dict[str, torch.Tensor]:
    joined = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in NAMES}
    order = (joined["contexts"] * 10_000 + joined["positions"]).argsort()
    return {name: values[order] for name, values in joined.items()}


@pytest.mark.parametrize("limit", [None, 1, 7, 30, 31, 35, 77, 10_000])
@pytest.mark.parametrize("batch_rows", [1, 9, 1000])
def test_rows_are_the_first_kept_ones(val_set: ShardSet, made: Any, limit: int | None, batch_rows: int) -> None:
    twin = made.kept_rows(val_set, limit)
    batches = list(row_batches(val_set.val, batch_rows, limit))
    got = reading_order(batches)
    for name, other in NAMES.items():
        assert torch.equal(got[name].to(twin[other].dtype), twin[other]), name
    assert [len(batch) for batch in batches[:-1]] == [batch_rows] * (len(batches) - 1)
    assert 0 < len(batches[-1]) <= batch_rows
    assert sum(map(len, batches)) == count_rows(val_set, "val", limit)


def test_special_positions_never_appear(val_set: ShardSet) -> None:
    for batch in row_batches(val_set.val, 16):
        assert not torch.isin(batch.tokens, torch.tensor(val_set.manifest.special_ids)).any()
        assert (batch.positions > 0).all()
