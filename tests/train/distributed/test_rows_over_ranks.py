"""Ranks that share every batch learn what one rank learns from all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.checkpoints import list_checkpoints
from matryoshka.errors import UserError
from matryoshka.ranks import Rank
from matryoshka.shards import ShardSet
from train.checkpoint import saved_state
from train.config import TrainConfig
from train.run import train_fleet

FLEET = [
    # Latents that stay silent for two batches are dead, so that the aux loss and its counters are at work.
    {"name": "aux", "dead_after_tokens": 256, "auxk_coef": 0.25, "k_aux": 5},
    {"name": "skip", "skip": True, "input": "resid_mid", "k_start": 12, "backend": "dense", "sampled_prefixes": 4},
]


@pytest.mark.torchrun
def test_two_ranks_equal_one(run_settings: dict[str, Any], tmp_path: Path, train_on_ranks: Callable[..., None]) -> None:
    settings = run_settings | {"steps": 50, "fleet": FLEET, "log_every": 5, "checkpoint_every": 20, "precision": "fp32"}
    train_fleet(TrainConfig.model_validate(settings | {"out": tmp_path / "one"}))
    train_on_ranks(settings | {"out": str(tmp_path / "two"), "parallel": "data"}, 2, torchrun=True)
    for entry in FLEET:
        one, two = (list_checkpoints(tmp_path / folder / str(entry["name"])) for folder in ("one", "two"))
        assert [c.step for c in one] == [c.step for c in two] == [40, 50]
        for ours, theirs in zip(one, two, strict=True):
            expected, found = saved_state(ours.folder), saved_state(theirs.folder)
            assert expected.keys() == found.keys()
            for name in expected:
                if expected[name].dtype == torch.int64:
                    assert torch.equal(found[name], expected[name]), name
                else:
                    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        final = [load_file(c[-1].folder / "transcoder.safetensors")["threshold"] for c in (one, two)]
        torch.testing.assert_close(final[1], final[0], rtol=1e-4, atol=1e-5)
        metrics = [
            (tmp_path / f / str(entry["name"]) / "metrics.jsonl").read_text().splitlines() for f in ("one", "two")
        ]
        assert len(metrics[0]) == 10
        for line, other in zip(*metrics, strict=True):
            assert json.loads(other) == pytest.approx(json.loads(line), rel=1e-4, abs=1e-6)
        if entry["name"] == "aux":
            assert any(json.loads(line)["aux_loss"] > 0 for line in metrics[0])


def test_only_where_processes_can_be_joined(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import run

    monkeypatch.setattr(run, "resolve_device", lambda _: torch.device("mps"))
    for parallel in ("data", "features"):
        config = TrainConfig.model_validate(run_settings | {"out": tmp_path / "run", "parallel": parallel})
        with pytest.raises(UserError, match=f"--parallel {parallel} joins processes on CPUs or CUDA GPUs"):
            train_fleet(config, rank=Rank(0, 2))


# One step on all ranks, each with its rows, against one step of one with all rows; the path of CUDA too. In the second
# half of the batches nearly all that is kept is on the last rank, which then is asked for more than its fair part.
DRIVER = """
import sys
from dataclasses import replace

import torch

sys.path[:0] = sys.argv[1:3]
from test_gradients import BATCH, CASES, batch_for
from train.distributed.rows_over_ranks import RowsOverRanks
from matryoshka.ranks import Rank
from train.step.step import NonFiniteLoss, TrainStep

rank = Rank.from_environment()
n = BATCH // rank.world
own = slice(rank.index * n, (rank.index + 1) * n)
with rank.together():
    for fixed_shapes in (False, True):
        for case, (settings, make) in CASES.items():
            if fixed_shapes and "ties" in case:
                continue  # there they fall as torch.topk lets them
            for backend in ("sparse", "dense"):
                chosen = replace(settings, backend=backend)
                whole, part = make(), make()
                together = RowsOverRanks(rank, 48)
                together._spare = 0
                steps = [TrainStep(chosen, whole, "cpu"), TrainStep(chosen, part, "cpu", together)]
                for step in steps:
                    step._fixed_shapes = fixed_shapes
                for number in range(4):
                    x, y = batch_for(case)
                    if number > 1 and "ties" not in case:
                        x[: BATCH - n] *= 0.01
                    one = steps[0](x, y, lr=1e-3, log=True)
                    two = steps[1](x[own], y[own], lr=1e-3, log=True)
                    for name in ("loss", "aux_loss", "l0", "dead_share", "threshold", "grad_norm", "l2_loss"):
                        a, b = getattr(one, name), getattr(two, name)
                        assert abs(a - b) <= 2e-5 * abs(a) + 1e-6, (case, backend, fixed_shapes, name, a, b)
                    assert max(abs(a - b) for a, b in zip(one.fvu, two.fvu)) < 1e-5
                for name, tensor in part.tensors().items():
                    expected = whole.tensors()[name]
                    torch.testing.assert_close(tensor, expected, rtol=2e-5, atol=2e-5, msg=f"{case} {backend} {name}")

        # One bad row, of the first rank: nobody's weights change, and all ranks say so.
        settings, make = next(iter(CASES.values()))
        state = make()
        step = TrainStep(settings, state, "cpu", RowsOverRanks(rank, 48))
        step._fixed_shapes = fixed_shapes
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        x, y = batch_for("")
        x[0, 0] = torch.nan
        try:
            step(x[own], y[own], lr=1e-3, log=True)
        except NonFiniteLoss as error:
            assert error.step == 0
        else:
            raise AssertionError("a batch that is not finite was trained on")
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, before[name]), name
"""


@pytest.mark.parametrize("world", [2, 4])
def test_one_step_of_every_kind(step_on_ranks: Callable[[str, int], None], world: int) -> None:
    step_on_ranks(DRIVER, world)


def test_a_rank_that_may_hold_more_is_seen() -> None:
    from train.distributed.rows_over_ranks import RowsOverRanks

    ranks = RowsOverRanks(Rank(0, 2), 6)
    offers = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]])
    assert bool(ranks._may_hold_more(offers, 3))  # the first may have a fourth above 3
    assert bool(ranks._may_hold_more(offers, 4))  # or one between 2 and 3
    assert not bool(ranks._may_hold_more(torch.tensor([[5.0, 4.0, 1.5], [2.0, 1.0, 0.0]]), 3))
    assert not bool(ranks._may_hold_more(torch.tensor([[5.0, 0.0, 0.0], [2.0, 1.0, 0.0]]), 6))


def test_ties_go_to_the_first_of_the_whole_batch(
    random_shards: ShardSet,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks of two rows each, the four largest of eight equal or smaller values, by hand."""
    from train.distributed import rows_over_ranks as module
    from train.distributed.rows_over_ranks import RowsOverRanks
    from train.step.sparse_acts import SparseActs

    acts = [torch.tensor([2.0, 1.0, 1.0, 0.5]), torch.tensor([3.0, 1.0, 1.0])]
    padded = [torch.cat([one, torch.full((4 - len(one),), -1.0)]) for one in acts]

    monkeypatch.setattr(module, "gather", lambda *_: torch.stack(padded))
    rows = [torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1])]
    latents = [torch.tensor([0, 3, 5, 1]), torch.tensor([2, 4, 0])]
    found = []
    for index in (0, 1):
        own = SparseActs(rows[index].int(), latents[index].int(), acts[index])
        kept = RowsOverRanks(Rank(index, 2), 6)._of_all(own, 4)
        found.append(sorted(zip(kept.rows.tolist(), kept.latents.tolist(), kept.acts.tolist(), strict=True)))
    assert found == [[(0, 5, 1.0), (1, 0, 2.0), (1, 3, 1.0)], [(0, 2, 3.0)]]
