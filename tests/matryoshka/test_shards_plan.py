"""How contexts are cut into splits and shards."""

from __future__ import annotations

import random

import pytest

from matryoshka.shards import SplitPlan, plan_splits
from matryoshka.shards.manifest import CHUNK_BYTES, MIN_SHARDS, SHARD_BYTES


def check(plan: SplitPlan, n_contexts: int, ctx_len: int, width: int) -> None:
    context_bytes = ctx_len * width * 2
    assert plan.n_contexts == n_contexts
    assert plan.n_shards == len(plan.shard_contexts)
    assert set(plan.shard_contexts[:-1]) <= {plan.contexts}
    assert 1 <= plan.shard_contexts[-1] <= plan.contexts
    assert plan.contexts == 1 or plan.contexts * context_bytes <= SHARD_BYTES
    assert ctx_len % plan.chunk_positions == 0
    position_bytes = plan.contexts * width * 2
    assert plan.chunk_positions == 1 or plan.chunk_positions * position_bytes <= CHUNK_BYTES


def cases() -> list[tuple[int, float, int, int]]:
    random_cases = random.Random(0)
    drawn = [
        (
            random_cases.choice([random_cases.randint(2, 60), random_cases.randint(60, 30_000)]),
            random_cases.choice([0.001, 0.05, 0.3, 0.999]),
            random_cases.choice([2, 7, 33, 128, 1000, 1024, 4096]),
            random_cases.choice([1, 24, 576, 2304, 20_000]),
        )
        for _ in range(300)
    ]
    return [*drawn, *((n, 0.05, 16, 24) for n in range(2, 100))]


def test_plans_hold_every_context_in_shards_of_bounded_size() -> None:
    for n_contexts, val_fraction, ctx_len, width in cases():
        splits = plan_splits(n_contexts, val_fraction, ctx_len, width)
        assert set(splits) == {"train", "val"}
        n_train, n_val = splits["train"].n_contexts, splits["val"].n_contexts
        assert n_train + n_val == n_contexts
        assert n_train >= 1
        assert n_val >= 1
        assert abs(n_val - n_contexts * val_fraction) <= 1
        assert splits["train"].n_shards >= min(MIN_SHARDS, n_train)
        check(splits["train"], n_train, ctx_len, width)
        check(splits["val"], n_val, ctx_len, width)


def test_the_real_recipe() -> None:
    """15M tokens of Gemma-2-2b in contexts of 1024: design.md 3.1's 64 contexts a shard, 302 MB."""
    splits = plan_splits(14_649, 0.05, 1024, 2304)
    train = splits["train"]
    assert train.n_contexts == 14_649 - 732
    assert train.contexts in (63, 64)
    assert 290e6 < train.contexts * 1024 * 2304 * 2 <= 304e6
    assert 2e6 <= train.chunk_positions * train.contexts * 2304 * 2 <= 4 * 2**20


@pytest.mark.parametrize(("n_train", "n_shards"), [(8, 8), (9, 9), (15, 15), (16, 8), (23, 12), (800, 8), (801, 9)])
def test_a_small_set_has_at_least_eight_shards(n_train: int, n_shards: int) -> None:
    train = plan_splits(n_train + 1, 1e-9, 16, 24)["train"]
    assert (train.n_contexts, train.n_shards) == (n_train, n_shards)
