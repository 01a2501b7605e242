"""Rows of a split in batches, against a loop over every context and position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate.rows.batches import RowBatch, count_rows, row_batches
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


@pytest.mark.parametrize("limit", [None, 35])
@pytest.mark.parametrize("n_batches", [0, 1, 3, 99])
def test_the_first_rows_can_be_passed_over(
    val_set: ShardSet, limit: int | None, n_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(row_batches(val_set.val, 9, limit))
    n_read = 0
    read = val_set.val.activations

    def counted(side: str, shard: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        nonlocal n_read
        n_read += 1
        return read(side, shard, start, stop)

    monkeypatch.setattr(val_set.val, "activations", counted)
    rest = list(row_batches(val_set.val, 9, limit, 9 * n_batches))
    assert len(rest) == len(whole[n_batches:])
    for got, expected in zip(rest, whole[n_batches:], strict=True):
        for name in NAMES:
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
    # Chunks that are wholly before are not read.
    assert (n_read == 0) == (n_batches == 99)
    before = n_read
    list(row_batches(val_set.val, 9, limit))
    assert before < n_read - before or n_batches == 0
