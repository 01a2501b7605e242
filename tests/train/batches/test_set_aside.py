"""Rows for the threshold: whole contexts of train that no batch ever holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from train.batches.set_aside import SetAside
from train.batches.stream import Stream
from train.config import TrainConfig
from train.run import train, train_fleet


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
    # 15 rows a context, up to the end of one
    assert aside.n_rows == 15 * min(-(-wanted // 15), n_train // 20 // 15)
    for shard, contexts in aside.contexts.items():
        assert len(contexts) <= -(-random_shards.train.shard_contexts[shard] // 8)
    for shard in range(random_shards.train.n_shards):
        chosen = aside.contexts.get(shard, torch.tensor([], dtype=torch.int64)).tolist()
        assert aside.mask(shard).nonzero().flatten().tolist() == chosen


def test_a_draw_of_its_own_for_each_seed(random_shards: ShardSet) -> None:
    drawn = [SetAside.draw(random_shards, 100, seed).contexts for seed in range(6)]
    again = SetAside.draw(random_shards, 100, 0).contexts
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in drawn[0].items()}
    assert len({str({k: v.tolist() for k, v in one.items()}) for one in drawn}) > 3


def test_more_rows_only_add_to_fewer(random_shards: ShardSet) -> None:
    few, many = (SetAside.draw(random_shards, n, seed=3).contexts for n in (20, 100))
    assert all(set(few[shard].tolist()) <= set(many[shard].tolist()) for shard in few)


def test_a_tiny_set_sets_one_context_aside(make_shards: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shards = make_shards(torch.randn(15 * 6, 12, generator=generator), torch.randn(15 * 6, 10, generator=generator))
    aside = SetAside.draw(shards, 65_536, seed=0)
    assert (sum(map(len, aside.contexts.values())), aside.n_rows) == (1, 15)


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_rows_come_as_many_together_as_are_wanted(random_shards: ShardSet, at_once: int) -> None:
    aside = SetAside.draw(random_shards, 100, seed=3)
    sizes = [len(rows) for rows in aside.source_rows(at_once)]
    assert set(sizes[:-1]) <= {at_once}
    assert sum(sizes) == aside.n_rows


def test_the_codec_changes_no_batch(make_shards: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(15 * 90, 12, generator=generator), torch.randn(15 * 90, 10, generator=generator)
    found = []
    for codec in ("compact", "raw"):
        shards = make_shards(*rows, codec=codec)
        aside = SetAside.draw(shards, 40, seed=2)
        stream = Stream(shards, batch_rows=40, buffer_rows=300, seed=2, aside=aside)
        found.append([batch.source for batch in stream.batches(0, 40)] + list(aside.source_rows(7)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_run_and_what_its_latents_start_from_never_see_them(
    random_shards: ShardSet, run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = SetAside.draw(random_shards, 100, seed=9)
    kept = as_keys(torch.cat(list(aside.source_rows(50))))
    seen: set[bytes] = set()
    assemble = Stream._assemble

    def noted(self: Stream, *args: Any) -> Any:
        batch = assemble(self, *args)
        seen.update(as_keys(batch.source))
        return batch

    monkeypatch.setattr(Stream, "_assemble", noted)
    settings = run_settings | {"out": tmp_path / "run", "order_seed": 9, "calibration_tokens": 100, "steps": None}
    result = train(TrainConfig.model_validate(settings))
    n_left = sum(int(random_shards.train.keep(shard).sum()) for shard in range(random_shards.train.n_shards))
    n_left -= aside.n_rows
    assert len(seen) > 0.9 * n_left
    assert not seen & kept
    assert result.n_steps == n_left // 128  # one epoch of what is left


def test_members_of_a_fleet_share_them(run_settings: dict[str, Any], tmp_path: Path) -> None:
    fleet = [{"name": "a"}, {"name": "b", "calibration_tokens": 50}]
    with pytest.raises(UserError, match="sets calibration_tokens, but all members are trained on the same batches"):
        train_fleet(TrainConfig.model_validate(run_settings | {"out": tmp_path / "fleet", "fleet": fleet}))


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
