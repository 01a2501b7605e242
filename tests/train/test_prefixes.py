"""Sampled prefixes: drawn as said, a function of seed and step, trained in place of the groups, which are measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.checkpoints import list_checkpoints
from matryoshka.errors import UserError
from matryoshka.transcoder import Transcoder
from train.config import TrainConfig
from train.prefixes import sampled_sizes
from train.progress import NoProgress
from train.run import train
from train.step.step import StepReport, StepSettings, StepState, TrainStep


def test_ends_are_distinct_and_the_full_width_is_always_among_them() -> None:
    for step in range(200):
        sizes = sampled_sizes(48, 7, seed=3, step=step)
        assert len(sizes) == 7
        assert min(sizes) >= 1
        assert sum(sizes) == 48


def test_the_edges() -> None:
    assert sampled_sizes(48, 1, seed=0, step=5) == (48,)
    assert sampled_sizes(6, 6, seed=0, step=5) == (1,) * 6
    assert sampled_sizes(1, 1, seed=0, step=0) == (1,)


def test_they_depend_on_seed_and_step_alone() -> None:
    drawn = [sampled_sizes(4608, 10, seed=1, step=step) for step in range(50)]
    assert drawn == [sampled_sizes(4608, 10, seed=1, step=step) for step in range(50)]
    assert len(set(drawn)) == 50
    assert drawn[7] != sampled_sizes(4608, 10, seed=2, step=7)
    assert sampled_sizes(4608, 10, seed=-1, step=7) == sampled_sizes(4608, 10, seed=-1, step=7)


def test_short_prefixes_come_as_often_as_said() -> None:
    """Ends below m have the share (sqrt(m) - 1) / (sqrt(d_sae) - 1): of 10,000, 9/99 below 100, 49/99 below 2,500."""
    ends = [sampled_sizes(10_000, 2, seed=0, step=step)[0] for step in range(4000)]
    for bound, share in ((100, 9 / 99), (2500, 49 / 99)):
        found = sum(end < bound for end in ends) / len(ends)
        assert abs(found - share) < 4 * (share * (1 - share) / len(ends)) ** 0.5


def step_with(sampled: tuple[int, ...] | None, backend: str) -> tuple[TrainStep, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    state = StepState.create(
        W_enc=torch.randn(48, 12, generator=g),
        b_enc=torch.zeros(48),
        W_dec=torch.nn.functional.normalize(torch.randn(48, 10, generator=g), dim=1),
        b_dec=torch.randn(10, generator=g),
        W_skip=0.1 * torch.randn(12, 10, generator=g),
    )
    settings = StepSettings(
        group_sizes=(6, 10, 12, 20), k=5, k_aux=7, dead_after_tokens=100, target_variance=10.0, precision="fp32"
    )
    settings = replace(settings, sampled_sizes=sampled, backend=backend)  # pyright: ignore[reportArgumentType]
    return TrainStep(settings, state, "cpu"), torch.randn(32, 12, generator=g), torch.randn(32, 10, generator=g)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_what_is_reported_are_the_groups(backend: str) -> None:
    reports = []
    for sampled in (None, (3, 40, 5)):
        step, x, y = step_with(sampled, backend)
        report = step(x, y, lr=1e-3, log=True)
        assert report is not None
        reports.append(report)
    assert reports[1].fvu == pytest.approx(reports[0].fvu, rel=1e-5)
    assert reports[1].l2_loss == pytest.approx(reports[0].l2_loss, rel=1e-5)
    assert abs(reports[1].loss - reports[0].loss) > 1e-3


def test_sizes_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="do not sum to d_sae"):
        step_with((3, 40, 6), "sparse")


class StopAt(NoProgress):
    def __init__(self, step: int) -> None:
        self.step = step

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:  # noqa: ARG002
        if step == self.step:
            raise KeyboardInterrupt


def learned(folder: Path) -> tuple[bytes, bytes, list[dict[str, float]]]:
    last = list_checkpoints(folder)[-1]
    assert last.is_finished
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    weights = [(last.folder / name).read_bytes() for name in ("transcoder.safetensors", "optimizer.safetensors")]
    return weights[0], weights[1], [json.loads(line) for line in lines]


def test_resumed_bit_for_bit_and_unmoved_by_how_often_is_logged(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig.model_validate(run_settings | {"sampled_prefixes": 5})
    train(config.model_copy(update={"out": tmp_path / "whole"}))
    with pytest.raises(KeyboardInterrupt):
        train(config.model_copy(update={"out": tmp_path / "resumed"}), StopAt(11))
    train(config.model_copy(update={"out": tmp_path / "resumed"}))
    whole = learned(tmp_path / "whole")
    assert learned(tmp_path / "resumed") == whole
    train(config.model_copy(update={"out": tmp_path / "often", "log_every": 1}))
    assert learned(tmp_path / "often")[:2] == whole[:2]
    train(config.model_copy(update={"out": tmp_path / "fixed", "sampled_prefixes": None}))
    assert learned(tmp_path / "fixed")[0] != whole[0]
    # The groups are those that were asked for, in the metrics and in what is saved.
    ends = [f"fvu/prefix_{end}" for end in accumulate(run_settings["group_sizes"])]
    assert all(set(ends) <= set(line) for line in whole[2])
    assert len([name for name in whole[2][0] if name.startswith("fvu/")]) == len(ends)
    saved = Transcoder.load(list_checkpoints(tmp_path / "whole")[-1].folder)
    assert saved.config.group_sizes == run_settings["group_sizes"]


def test_more_prefixes_than_latents_are_refused(run_settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampled_prefixes = 49 are more than the 48 latents"):
        train(TrainConfig.model_validate(run_settings | {"sampled_prefixes": 49, "out": tmp_path / "run"}))
