"""The stream against the whole set read in order."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from train.batches.set_aside import SetAside
from train.batches.stream import Stream


def rows_of(shards: ShardSet) -> Counter[bytes]:
    """Every non-special train row, source and target together, as bytes."""
    found: Counter[bytes] = Counter()
    for block in shards.train.blocks():
        found.update(keys(*block.rows()))
    return found


def keys(source: Tensor, target: Tensor) -> list[bytes]:
    pairs = torch.cat([source, target], dim=1).view(torch.int16)
    return [row.numpy().tobytes() for row in pairs]


def stream_of(shards: ShardSet, batch_rows: int = 64, buffer_rows: int = 300, seed: int = 3, **options: Any) -> Stream:
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
    plans = [stream.stream_rows(i) for i in range(stream.n_streams)]
    assert sum(plans) == stream.n_rows
    assert max(plans) - min(plans) <= 1
    for i, n_rows in enumerate(plans):
        plan = stream.stream_plan(0, i)
        assert sum(piece.stop - piece.start for block in plan.blocks for piece in block) == n_rows


@pytest.mark.parametrize("buffer_rows", [64, 700, 10**6])
def test_every_block_fits_into_the_memory_that_is_estimated(random_shards: ShardSet, buffer_rows: int) -> None:
    stream = stream_of(random_shards, buffer_rows=buffer_rows)
    source, target = stream.memory()
    plans = [stream.stream_plan(epoch, i) for epoch in range(5) for i in range(stream.n_streams)]
    largest = max(sum(piece.stop - piece.start for piece in block) for plan in plans for block in plan.blocks)
    assert largest <= len(source) == len(target)


def test_what_is_estimated_is_what_is_taken(random_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    memory = Stream.memory

    def counted(self: Stream) -> tuple[Tensor, Tensor]:
        both = memory(self)
        taken.append(sum(side.nbytes for side in both))
        return both

    monkeypatch.setattr(Stream, "memory", counted)
    stream = stream_of(random_shards)
    (batch,) = stream.batches(0, 1)
    # Four batches wait, one is being filled and one is in use.
    assert stream.n_bytes == sum(taken) + 6 * (batch.source.nbytes + batch.target.nbytes)


def test_an_iterator_may_be_closed_at_any_time(random_shards: ShardSet) -> None:
    batches = stream_of(random_shards).batches(0, 10_000)
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_reading_error_reaches_the_trainer(random_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(random_shards)

    def fail(_pieces: object, _memory: object) -> tuple[Tensor, Tensor]:
        raise OSError("disk gone")

    monkeypatch.setattr(stream, "load", fail)
    with pytest.raises(OSError, match="disk gone"):
        next(stream.batches(0, 5))


def test_reading_leaves_the_cores_to_the_step(random_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    for name in ("load", "_assemble"):  # on the threads that read chunks, and on the one that puts batches together
        original = getattr(Stream, name)

        def counted(*args: Any, original: Any = original) -> Any:
            seen.add(torch.get_num_threads())
            return original(*args)

        monkeypatch.setattr(Stream, name, counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in stream_of(random_shards).batches(0, 3):
            assert torch.get_num_threads() == 3
        assert seen == {1}
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_a_batch_larger_than_the_set_is_refused(random_shards: ShardSet) -> None:
    with pytest.raises(UserError, match="training rows, fewer than one batch"):
        stream_of(random_shards, batch_rows=100_000)
    aside = SetAside.draw(random_shards, 1, seed=0)
    with pytest.raises(UserError, match=r"training rows \(beside the 15 that are set aside .*fewer than one batch"):
        stream_of(random_shards, batch_rows=100_000, aside=aside)


class Documents:
    """A large set as the stream sees it, whose activations are the number of each row's document: a context each."""

    def __init__(self, n_shards: int, contexts: int, ctx_len: int, chunk_positions: int) -> None:
        self.path, self.d_in, self.d_out = Path("documents"), 2, 2  # the 32 bits of a number as two bfloat16
        keep = torch.ones(ctx_len, contexts, dtype=torch.bool)
        keep[0] = False

        def activations(_side: str, shard: int, start: int, stop: int, *, reuse: bool) -> Tensor:  # noqa: ARG001
            ids = torch.arange(contexts, dtype=torch.int32) + shard * contexts
            return ids.expand(stop - start, contexts).contiguous().unsqueeze(2).view(torch.bfloat16)

        self.train = SimpleNamespace(
            n_shards=n_shards, chunk_positions=chunk_positions, keep=lambda _: keep.clone(), activations=activations
        )


def test_few_rows_of_a_batch_share_a_document() -> None:
    """The layout of 15M tokens, 64 contexts of 1024 a shard in chunks of 8 positions, with a buffer of 131k rows."""
    documents: Any = Documents(n_shards=228, contexts=64, ctx_len=1024, chunk_positions=8)
    stream = Stream(documents, batch_rows=4096, buffer_rows=131_072, seed=0)
    for start in (0, 100):
        (batch,) = stream.batches(start, start + 1)
        counts = torch.unique(batch.source.contiguous().view(torch.int32), return_counts=True)[1].double()
        others = float((counts * (counts - 1)).sum()) / 4096
        # Drawn at random it would be 4096 / 14592 = 0.28; in the order of the contexts, 16 and more.
        assert others < 1


@pytest.mark.parametrize("n_readers", [2, 4])
def test_reader_threads_change_nothing(random_shards: ShardSet, n_readers: int) -> None:
    aside = SetAside.draw(random_shards, 100, seed=3)
    one = list(stream_of(random_shards, aside=aside).batches(0, 60))
    many = list(stream_of(random_shards, aside=aside, n_readers=n_readers).batches(0, 60))
    assert all(
        torch.equal(a.source, b.source) and torch.equal(a.target, b.target) for a, b in zip(one, many, strict=True)
    )


def test_a_batch_of_a_written_set_is_nearly_a_random_draw(random_shards: ShardSet) -> None:
    """benchmarks/shuffle.py counts the same over a set of a million rows."""
    document: dict[bytes, int] = {}
    for block in random_shards.train.blocks():
        documents = block.doc_ids[block.keep].tolist()
        document.update(zip(keys(*block.rows()), documents, strict=True))
    counts = Counter(document.values())
    n_rows = sum(counts.values())
    at_random = sum(n * (n - 1) for n in counts.values()) / n_rows * 63 / (n_rows - 1)
    stream = stream_of(random_shards, batch_rows=64, buffer_rows=1024)
    found = []
    for batch in stream.batches(0, n_rows // 64):
        ids = Counter(document[key] for key in keys(batch.source, batch.target))
        found.append(sum(n * (n - 1) for n in ids.values()) / 64)
    assert 0.8 * at_random < sum(found) / len(found) < 1.5 * at_random
    # Contexts one after another would put most of a document's 30 rows into one batch.
    assert max(found) < 5


@pytest.mark.parametrize("n_parts", [2, 4])
def test_the_parts_of_the_ranks_are_the_batch(random_shards: ShardSet, n_parts: int) -> None:
    aside = SetAside.draw(random_shards, 100, seed=3)
    whole = list(stream_of(random_shards, aside=aside).batches(3, 50))
    parts = [list(stream_of(random_shards, aside=aside, part=(i, n_parts)).batches(3, 50)) for i in range(n_parts)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].source for part in parts]), batch.source)
        assert torch.equal(torch.cat([part[step].target for part in parts]), batch.target)


def test_ranks_that_cannot_share_a_batch_are_refused(random_shards: ShardSet) -> None:
    with pytest.raises(UserError, match="8 streams, which 3 ranks cannot share"):
        stream_of(random_shards, part=(0, 3))
