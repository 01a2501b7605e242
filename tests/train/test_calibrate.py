"""The calibrated threshold keeps exactly k latents a row on average."""

from __future__ import annotations

import pytest
import torch

from matryoshka.shards import ShardSet
from train.batches.conditioning import Conditioning
from train.batches.set_aside import SetAside
from train.calibrate import calibrate_threshold
from train.step.step import StepState


def make_state(b_enc: float = 0.0) -> StepState:
    g = torch.Generator().manual_seed(0)
    return StepState.create(
        W_enc=torch.randn(40, 12, generator=g) / 12**0.5,
        b_enc=torch.full((40,), b_enc),
        W_dec=torch.nn.functional.normalize(torch.randn(40, 10, generator=g), dim=1),
        b_dec=torch.zeros(10),
    )


@pytest.mark.parametrize("n_rows", [1, 100, 10_000])
@pytest.mark.parametrize("k", [1, 5])
def test_mean_l0_is_k_on_the_rows_that_are_set_aside(random_shards: ShardSet, k: int, n_rows: int) -> None:
    conditioning = Conditioning.from_shards(random_shards, "normalized", "centre", torch.device("cpu"))
    state = make_state()
    aside = SetAside.draw(random_shards, n_rows, seed=4)
    threshold = calibrate_threshold(state, conditioning, aside, k=k)
    rows = torch.cat(list(aside.source_rows(7)))
    assert len(rows) == aside.n_rows
    pre_acts = conditioning.input(rows) @ state.W_enc.T + state.b_enc
    naive = pre_acts.flatten().sort(descending=True).values[k * len(rows)]
    assert threshold == pytest.approx(float(naive), abs=1e-6)
    assert int((pre_acts > threshold).sum()) == pytest.approx(k * len(rows), abs=1)


def test_never_below_zero(random_shards: ShardSet) -> None:
    conditioning = Conditioning.from_shards(random_shards, "normalized", "centre", torch.device("cpu"))
    aside = SetAside.draw(random_shards, 200, seed=0)
    assert calibrate_threshold(make_state(b_enc=-50.0), conditioning, aside, k=3) == 0.0
