"""Which part each row belongs to, by hand; and the whole breakdown against loops over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evaluate.measures.breakdown import (
    QUANTILE_LEVELS,
    Breakdown,
    frequency_partition,
    histogram_quantiles,
    position_partition,
    train_token_counts,
)
from evaluate.measures.records import Stratum
from evaluate.rows.batches import row_batches
from matryoshka.shards import ShardSet


def test_positions_double() -> None:
    partition = position_partition(11)
    assert partition.names == ("0", "1", "2-3", "4-7", "8-10")
    assert partition.part_of.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4]


def test_frequencies_by_decade() -> None:
    counts = torch.tensor([0, 1, 9, 11, 1_000_000 - 21])
    partition = frequency_partition(counts)
    named = [partition.names[part] for part in partition.part_of.tolist()]
    # 1e-6 itself counts as the decade above it
    assert named == ["not in train", "1e-6 to 1e-5", "1e-6 to 1e-5", "1e-5 to 1e-4", "1e-2 and more"]


def test_train_tokens_are_counted(val_set: ShardSet) -> None:
    counts = train_token_counts(val_set)
    tokens = torch.cat([val_set.train.tokens(shard).flatten() for shard in range(val_set.train.n_shards)])
    for token in range(len(counts)):
        assert int(counts[token]) == int((tokens == token).sum())
    assert int(counts.sum()) == tokens.numel()


def test_quantiles_of_a_histogram() -> None:
    values = torch.randint(0, 23, (101,), generator=torch.Generator().manual_seed(0))
    got = histogram_quantiles(torch.bincount(values), QUANTILE_LEVELS)
    assert list(got) == np.quantile(values.numpy(), QUANTILE_LEVELS, method="inverted_cdf").tolist()


def test_breakdown_against_loops(val_set: ShardSet, made: Any) -> None:
    rows = made.kept_rows(val_set)
    n = len(rows["target"])
    y = rows["target"].double().numpy()
    breakdown = Breakdown(val_set, 2)
    error = {}
    for batch in row_batches(val_set.val, 9):
        sq_err = torch.stack([batch.source.float().square().sum(1), batch.target.float().abs().sum(1)])
        breakdown.add(batch, batch.target.float(), sq_err, torch.stack([batch.positions, batch.contexts]))
    error = torch.stack([rows["source"].float().square().sum(1), rows["target"].float().abs().sum(1)]).double().numpy()
    l0 = np.stack([rows["position"].numpy(), rows["context"].numpy()])
    deviation = ((y - y.mean(0)) ** 2).sum(1)

    def check(stratum: Stratum, here: np.ndarray) -> None:
        assert stratum.n_rows == here.sum() > 0
        assert stratum.fvu == pytest.approx(error[:, here].sum(1) / deviation[here].sum(), rel=1e-5)
        assert stratum.l0 == pytest.approx(l0[:, here].mean(1))
        assert stratum.share_of_variance == pytest.approx(deviation[here].sum() / deviation.sum(), rel=1e-5)

    positions = rows["position"].numpy()
    for stratum in breakdown.by_position():
        first, _, last = stratum.name.partition("-")
        check(stratum, (positions >= int(first)) & (positions <= int(last or first)))
    partition = frequency_partition(train_token_counts(val_set))
    strata = breakdown.by_token_frequency()
    for stratum in strata:
        part = partition.names.index(stratum.name)
        check(stratum, (partition.part_of[rows["token"]] == part).numpy())
    assert sum(stratum.n_rows for stratum in strata) == n


def test_documents_need_enough_rows(val_set: ShardSet, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made.kept_rows(val_set)
    monkeypatch.setattr("evaluate.measures.breakdown.MIN_DOCUMENT_ROWS", 9)
    breakdown = Breakdown(val_set, 1)
    for batch in row_batches(val_set.val, 9):
        sq_err = batch.source.float().square().sum(1)[None]
        breakdown.add(batch, batch.target.float(), sq_err, batch.positions[None])
    y = rows["target"].double()
    deviation = (y - y.mean(0)).square().sum(1)
    error = rows["source"].double().square().sum(1)
    fvu = []
    for document in rows["doc"].unique():
        here = rows["doc"] == document
        if int(here.sum()) >= 9:
            fvu.append(float(error[here].sum() / deviation[here].sum()))
    assert 1 < len(fvu) < len(rows["doc"].unique())
    spread = breakdown.by_document()
    assert spread.n_documents == len(fvu)
    assert spread.fvu_quantiles is not None
    assert spread.fvu_quantiles[0] == pytest.approx(np.quantile(fvu, QUANTILE_LEVELS), rel=1e-5)
    monkeypatch.setattr("evaluate.measures.breakdown.MIN_DOCUMENT_ROWS", 1000)
    assert breakdown.by_document().fvu_quantiles is None
