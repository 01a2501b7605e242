"""The stream against the whole set read in order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from train.stream import Stream


def rows_of(shards: ShardSet) -> Counter[bytes]:
    """Every non-special train row, source and target together, as bytes."""
    found: Counter[bytes] = Counter()
    for block in shards.train.blocks():
        found.update(keys(*block.rows()))
    return found


def keys(source: Tensor, target: Tensor) -> list[bytes]:
    pairs = torch.cat([source, target], dim=1).view(torch.int16)
    return [row.numpy().tobytes() for row in pairs]


def stream_of(
    shards: ShardSet, batch_rows: int = 64, buffer_rows: int = 300, seed: int = 3, **options: float
) -> Stream:
    return Stream(shards, batch_rows=batch_rows, buffer_rows=buffer_rows, seed=seed, **options)  # pyright: ignore


def test_every_row_comes_once_in_an_epoch(random_shards: ShardSet) -> None:
    expected = rows_of(random_shards)
    n_rows = sum(expected.values())
    batch_rows = next(b for b in (56, 40, 30, 20, 15, 10, 5, 3, 2) if n_rows % b == 0)
    stream = stream_of(random_shards, batch_rows=batch_rows)
    assert stream.n_rows == n_rows
    for epoch in range(2):
        steps = n_rows // batch_rows
        seen: Counter[bytes] = Counter()
        for batch in stream.batches(epoch * steps, (epoch + 1) * steps):
            seen.update(keys(batch.source, batch.target))
        if stream.n_rows % stream.n_streams == 0:
            assert seen == expected
        else:
            # Streams whose parts differ by a row run into the next epoch by that row.
            assert sum((seen - expected).values()) <= stream.n_streams * (epoch + 1)


def test_a_batch_depends_on_seed_and_step_only(random_shards: ShardSet) -> None:
    stream = stream_of(random_shards)
    in_order = list(stream.batches(0, 60))
    for start in (0, 1, 17, 43, 59):
        again = next(stream_of(random_shards).batches(start, start + 1))
        assert torch.equal(again.source, in_order[start].source)
        assert torch.equal(again.target, in_order[start].target)
    other = next(stream_of(random_shards, seed=4).batches(0, 1))
    assert not torch.equal(other.source, in_order[0].source)


def test_epochs_are_ordered_differently(random_shards: ShardSet) -> None:
    stream = stream_of(random_shards)
    steps = stream.n_rows // stream.batch_rows
    first, later = next(stream.batches(0, 1)), next(stream.batches(steps, steps + 1))
    assert not torch.equal(first.source, later.source)


def test_no_special_position_comes_through(random_shards: ShardSet) -> None:
    for batch in stream_of(random_shards).batches(0, 50):
        assert float(batch.source.abs().max()) < 1e3


def test_max_norm_leaves_out_exactly_the_large_rows(random_shards: ShardSet) -> None:
    median = random_shards.norm_quantiles("source")[0.5]
    everything = torch.cat([block.rows()[0] for block in random_shards.train.blocks()]).float()
    expected = int((everything.norm(dim=1) <= 1.2 * median).sum())
    assert 0 < expected < len(everything)
    stream = stream_of(random_shards, max_norm=1.2)
    assert stream.n_rows == expected
    for batch in stream.batches(0, 20):
        assert float(batch.source.float().norm(dim=1).max()) <= 1.2 * median * (1 + 1e-6)


@pytest.mark.parametrize("batch_rows", [7, 64])
def test_streams_share_the_rows_evenly(random_shards: ShardSet, batch_rows: int) -> None:
    stream = stream_of(random_shards, batch_rows=batch_rows)
    lanes = [stream.lane_rows(i) for i in range(stream.n_streams)]
    assert sum(lanes) == stream.n_rows
    assert max(lanes) - min(lanes) <= 1
    for i, n_rows in enumerate(lanes):
        lane = stream.lane(0, i)
        assert sum(piece.stop - piece.start for block in lane.blocks for piece in block) == n_rows


def test_an_iterator_may_be_closed_at_any_time(random_shards: ShardSet) -> None:
    batches = stream_of(random_shards).batches(0, 10_000)
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_reading_error_reaches_the_trainer(random_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(random_shards)

    def fail(_pieces: object) -> tuple[Tensor, Tensor]:
        raise OSError("disk gone")

    monkeypatch.setattr(stream, "load", fail)
    with pytest.raises(OSError, match="disk gone"):
        next(stream.batches(0, 5))


def test_a_batch_larger_than_the_set_is_refused(random_shards: ShardSet) -> None:
    with pytest.raises(UserError, match="fewer than one batch"):
        stream_of(random_shards, batch_rows=100_000)
