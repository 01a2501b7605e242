"""Ranks that share the latents of a dictionary learn what one rank learns that holds them all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.checkpoints import list_checkpoints
from matryoshka.errors import UserError
from matryoshka.ranks import Rank
from matryoshka.transcoder import Transcoder
from train.checkpoint import saved_state
from train.config import TrainConfig
from train.distributed.latent_slice import LatentSlice, is_by_latent
from train.run import train_fleet

FLEET: list[dict[str, Any]] = [
    # Latents that stay silent for two batches are dead, so that the aux loss and its counters are at work. 49 latents
    # cannot be shared evenly.
    {"name": "aux", "group_sizes": [8, 16, 25], "dead_after_tokens": 256, "auxk_coef": 0.25, "k_aux": 5},
    {"name": "skip", "skip": True, "input": "resid_mid", "k_start": 12, "backend": "dense", "sampled_prefixes": 4},
    {"name": "tied", "init": "tied", "seed": 3, "backend": "sparse", "sampled_prefixes": 3},
]


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name in expected:
        if expected[name].dtype == torch.int64:
            assert torch.equal(found[name], expected[name]), name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_two_ranks_equal_one_and_either_goes_on_from_the_other(
    run_settings: dict[str, Any], tmp_path: Path, train_on_ranks: Callable[..., None]
) -> None:
    settings = run_settings | {"steps": 50, "fleet": FLEET, "log_every": 5, "checkpoint_every": 20, "precision": "fp32"}
    train_fleet(TrainConfig.model_validate(settings | {"out": tmp_path / "one"}))
    train_on_ranks(settings | {"out": str(tmp_path / "two"), "parallel": "features"}, 2)
    for entry in FLEET:
        one, two = (list_checkpoints(tmp_path / folder / entry["name"]) for folder in ("one", "two"))
        assert [c.step for c in one] == [c.step for c in two] == [40, 50]
        for ours, theirs in zip(one, two, strict=True):
            assert_same(saved_state(ours.folder), saved_state(theirs.folder))
        final = [load_file(c[-1].folder / "transcoder.safetensors") for c in (one, two)]
        torch.testing.assert_close(final[1], final[0], rtol=1e-4, atol=2e-5)
        assert Transcoder.load(two[-1].folder).config.group_sizes == Transcoder.load(one[-1].folder).config.group_sizes
        metrics = [(tmp_path / f / entry["name"] / "metrics.jsonl").read_text().splitlines() for f in ("one", "two")]
        assert len(metrics[0]) == 10
        for line, other in zip(*metrics, strict=True):
            assert json.loads(other) == pytest.approx(json.loads(line), rel=1e-4, abs=1e-6)
        if entry["name"] == "aux":
            assert any(json.loads(line)["aux_loss"] > 0 for line in metrics[0])

    # From the checkpoint that two ranks wrote after 40 steps, two go on bit for bit, and one to rounding.
    for folder in ("again", "alone"):
        shutil.copytree(tmp_path / "two", tmp_path / folder)
        for entry in FLEET:
            shutil.rmtree(tmp_path / folder / entry["name"] / "checkpoints" / "step-000050")
    train_on_ranks(settings | {"out": str(tmp_path / "again"), "parallel": "features"}, 2)
    train_fleet(TrainConfig.model_validate(settings | {"out": tmp_path / "alone"}))
    for entry in FLEET:
        two, again, alone = (
            list_checkpoints(tmp_path / f / entry["name"])[-1].folder for f in ("two", "again", "alone")
        )
        for name in ("transcoder.safetensors", "optimizer.safetensors"):
            assert (again / name).read_bytes() == (two / name).read_bytes()
        assert_same(load_file(two / "optimizer.safetensors"), load_file(alone / "optimizer.safetensors"))


# One step on all ranks against one step of one, over cases that a run of fifty steps may never meet.
DRIVER = """
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

sys.path[:0] = sys.argv[1:3]
from test_gradients import CASES, batch_for
from train.distributed.latents_over_ranks import LatentsOverRanks
from matryoshka.ranks import Rank
from train.distributed.latent_slice import LatentSlice, is_by_latent
from train.step.step import StepState, TrainStep

rank = Rank.from_environment()
with rank.together():
    for fixed_shapes in (False, True):
        for case, (settings, make) in CASES.items():
            if fixed_shapes and "ties" in case:
                continue  # there they fall as torch.topk lets them
            for backend in ("sparse", "dense"):
                chosen = replace(settings, backend=backend)
                whole = make()
                held = LatentSlice(rank, 48)
                named = {n: held.part(t) if is_by_latent(n) else t for n, t in whole.weights().items()}
                part = StepState.create(**named)
                part.tokens_since_fired.copy_(held.part(whole.tokens_since_fired))
                together = LatentsOverRanks(rank, 48)
                steps = [TrainStep(chosen, whole, "cpu"), TrainStep(chosen, part, "cpu", together)]
                for step in steps:
                    step._fixed_shapes = fixed_shapes
                for _ in range(3):
                    one, two = (step(*batch_for(case), lr=1e-3, log=True) for step in steps)
                    for name in ("loss", "aux_loss", "l0", "dead_share", "threshold", "grad_norm", "l2_loss"):
                        a, b = getattr(one, name), getattr(two, name)
                        assert abs(a - b) <= 1e-5 * abs(a) + 1e-7, (case, backend, fixed_shapes, name, a, b)
                for name, tensor in part.tensors().items():
                    expected = whole.tensors()[name]
                    expected = held.part(expected) if is_by_latent(name) else expected
                    torch.testing.assert_close(tensor, expected, rtol=2e-5, atol=2e-5, msg=f"{case} {backend} {name}")
                    if is_by_latent(name) and rank.index == 0:
                        assert len(tensor) == len(held.latents)
"""


@pytest.mark.parametrize("world", [2, 3])
def test_one_step_of_every_kind(step_on_ranks: Callable[[str, int], None], world: int) -> None:
    step_on_ranks(DRIVER, world)


def test_ties_go_to_the_first_of_the_whole_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the even and the odd of six latents, the four largest of seven entries, by hand."""
    from train.distributed import latents_over_ranks as module
    from train.distributed.latents_over_ranks import LatentsOverRanks
    from train.step.sparse_acts import SparseActs

    # Of (row, latent): 3.0 at (0, 2), 2.0 at (1, 1); 1.0 at (0, 5), (1, 0), (1, 2), (1, 3); 0.5 at (0, 0).
    own = [
        SparseActs(torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 0]), torch.tensor([3.0, 1.0, 1.0, 0.5])),
        SparseActs(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 1]), torch.tensor([2.0, 1.0, 1.0])),
    ]
    found = []
    for index in (0, 1):
        ranks = LatentsOverRanks(Rank(index, 2), 6)
        flats = [torch.tensor([1 * 6 + 0, 1 * 6 + 2]), torch.tensor([0 * 6 + 5, 1 * 6 + 3])]
        offers = [torch.cat([one.acts, torch.full((4 - len(one.acts),), -1.0)]) for one in own]
        answers = [offers, flats]

        def gather(
            given: torch.Tensor, _rank: Rank, answers: list[list[torch.Tensor]] = answers, index: int = index
        ) -> torch.Tensor:
            everyone = answers.pop(0)
            assert torch.equal(given, everyone[index])
            return torch.stack(everyone)

        monkeypatch.setattr(module, "gather", gather)
        kept = ranks._of_all(own[index], 4, 4)
        assert kept is not None
        numbers = ranks._slice.numbers(kept.latents).tolist()
        found.append(sorted(zip(kept.rows.tolist(), numbers, kept.acts.tolist(), strict=True)))
    assert found == [[(0, 2, 3.0), (1, 0, 1.0)], [(0, 5, 1.0), (1, 1, 2.0)]]


def test_a_rank_with_more_than_it_was_asked_for_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.distributed import latents_over_ranks as module
    from train.distributed.latents_over_ranks import LatentsOverRanks
    from train.step.sparse_acts import SparseActs

    ranks = LatentsOverRanks(Rank(0, 2), 6)
    own = SparseActs(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]), torch.tensor([3.0, 2.0, 1.5]))
    # The fourth largest of all is 1.5, so this rank may hold more of that size; then it is 2: it holds no more of that.
    for other, again in ((torch.tensor([4.0, 1.0, 0.5]), True), (torch.tensor([4.0, 2.5, 0.5]), False)):
        monkeypatch.setattr(module, "gather", lambda given, _rank, other=other: torch.stack([given, other]))
        assert (ranks._of_all(own, 3, 4) is None) is again


def test_parts_are_every_nth_latent() -> None:
    whole = torch.arange(10)
    parts = [LatentSlice(Rank(index, 3), 10) for index in range(3)]
    assert [part.part(whole).tolist() for part in parts] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    for part in parts:
        assert list(part.latents) == part.part(whole).tolist()
        assert torch.equal(part.numbers(torch.arange(len(part.latents), dtype=torch.int32)), part.part(whole))
    with pytest.raises(UserError, match="2 latents cannot be spread over 3 ranks"):
        LatentSlice(Rank(0, 3), 2)


def test_what_has_a_row_for_each_latent() -> None:
    names = ["W_enc", "b_enc", "W_dec", "tokens_since_fired", "adam.exp_avg.W_dec", "adam.exp_avg_sq.b_enc"]
    assert all(map(is_by_latent, names))
    assert not any(map(is_by_latent, ["b_dec", "W_skip", "threshold", "step", "adam.exp_avg.b_dec"]))
