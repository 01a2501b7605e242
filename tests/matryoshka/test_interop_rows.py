"""The rows of a shard set as torch batches and as Arrow, against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from matryoshka.errors import UserError
from matryoshka.interop.rows import RowDataset, arrow_batches
from matryoshka.shards import ShardSet


@pytest.fixture
def shards(toy_path: Path) -> ShardSet:
    return ShardSet.open(toy_path)


def joined(batches: Any) -> tuple[Tensor, Tensor]:
    pairs = list(batches)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def sorted_rows(x: Tensor, y: Tensor) -> list[list[float]]:
    return sorted(torch.cat([x, y], dim=1).tolist())


def test_all_rows_in_the_order_of_the_disk(toy: Any, shards: ShardSet) -> None:
    batches = list(RowDataset(shards, batch_rows=7))
    assert {len(x) for x, _ in batches[:-1]} == {7}
    assert 0 < len(batches[-1][0]) <= 7
    x, y = joined(batches)
    assert x.dtype == y.dtype == torch.float32
    assert torch.equal(x.double(), toy.kept_rows("source"))
    assert torch.equal(y.double(), toy.kept_rows("target"))


def test_shuffled_pairs_stay_pairs(toy: Any, shards: ShardSet) -> None:
    expected = sorted_rows(toy.kept_rows("source").float(), toy.kept_rows("target").float())
    first, again, other = (joined(RowDataset(shards, seed=seed, batch_rows=5)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0].double(), toy.kept_rows("source"))
    for pair in (first, other):
        assert sorted_rows(*pair) == expected


def test_workers_share_the_shards_out(shards: ShardSet) -> None:
    loader = DataLoader(RowDataset(shards, batch_rows=5), batch_size=None, num_workers=2)
    assert sorted_rows(*joined(loader)) == sorted_rows(*joined(RowDataset(shards)))


def test_conventions(shards: ShardSet) -> None:
    assert shards.norm is not None
    raw, _ = joined(RowDataset(shards))
    for convention, expected in (("normalized", shards.norm.normalized(raw)), ("mlp_in", shards.norm.with_gain(raw))):
        x, _ = joined(RowDataset(shards, input=convention))
        torch.testing.assert_close(x, expected)
        assert (x - raw).norm() > 0.1 * raw.norm()


def test_refusals(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="input 'mlp' does not exist"):
        RowDataset(shards, input="mlp")
    with pytest.raises(UserError, match="no split 'test'"):
        RowDataset(shards, "test")
    with pytest.raises(UserError, match="1 or more"):
        RowDataset(shards, batch_rows=0)


def test_arrow(toy: Any, shards: ShardSet) -> None:
    table = arrow_batches(shards).read_all()
    assert table.schema.field("source").type == pa.list_(pa.float32(), shards.d_in)
    source = torch.tensor(table["source"].to_pylist(), dtype=torch.float64)
    target = torch.tensor(table["target"].to_pylist(), dtype=torch.float64)
    assert torch.equal(source, toy.kept_rows("source"))
    assert torch.equal(target, toy.kept_rows("target"))
    for i in range(0, len(table), 5):
        row = {name: table[name][i].as_py() for name in ("shard", "context", "position", "token", "doc_id")}
        tokens, doc_ids, x, _ = toy.pieces["train", row["shard"]]
        context, position = row["context"], row["position"]
        assert int(tokens[context, position]) == row["token"]
        assert int(doc_ids[context, position]) == row["doc_id"]
        assert torch.equal(x[position, context].double(), source[i])
