"""Ranks that share every batch learn what one rank learns from all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from train.checkpoint import list_checkpoints
from train.config import TrainConfig
from train.run import train_fleet

ROOT = Path(__file__).resolve().parents[2]
FLEET = [
    # Latents that stay silent for two batches are dead, so that the aux loss and its counters are at work.
    {"name": "aux", "dead_after_tokens": 256, "auxk_coef": 0.25, "k_aux": 5},
    {"name": "skip", "skip": True, "input": "resid_mid", "k_start": 12, "backend": "dense", "sampled_prefixes": 4},
]


def on_ranks(settings: dict[str, Any], folder: Path, world: int) -> None:
    """Train in `world` processes, as a user would start them."""
    config = folder / "p.yaml"
    config.write_text(json.dumps({"train": settings}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*launcher, "-m", "train", "run", "--config", str(config), "--parallel", "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr


def test_two_ranks_equal_one(run_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = run_settings | {"steps": 50, "fleet": FLEET, "log_every": 5, "checkpoint_every": 20, "precision": "fp32"}
    train_fleet(TrainConfig.model_validate(settings | {"out": tmp_path / "one"}))
    on_ranks(settings | {"out": str(tmp_path / "two")}, tmp_path, 2)
    for entry in FLEET:
        one, two = (list_checkpoints(tmp_path / folder / str(entry["name"])) for folder in ("one", "two"))
        assert [c.step for c in one] == [c.step for c in two] == [40, 50]
        for ours, theirs in zip(one, two, strict=True):
            expected, found = ours.tensors(), theirs.tensors()
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


def test_only_the_cpu(run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import run
    from train.ranks import Rank

    monkeypatch.setattr(run, "resolve_device", lambda _: torch.device("cuda"))
    config = TrainConfig.model_validate(run_settings | {"out": tmp_path / "run", "parallel": "data"})
    with pytest.raises(UserError, match="CPU processes only"):
        train_fleet(config, rank=Rank(0, 2))


def test_ties_go_to_the_first_of_the_whole_batch(
    random_shards: ShardSet,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks of two rows each, the four largest of eight equal or smaller values, by hand."""
    from train import parallel
    from train.entries import Kept
    from train.parallel import ParallelStep
    from train.ranks import Rank

    acts = [torch.tensor([2.0, 1.0, 1.0, 0.5]), torch.tensor([3.0, 1.0, 1.0])]
    padded = [torch.cat([one, torch.full((4 - len(one),), -1.0)]) for one in acts]

    def gather(everyone: list[torch.Tensor], _own: torch.Tensor) -> None:
        for place, one in zip(everyone, padded, strict=True):
            place.copy_(one)

    monkeypatch.setattr(parallel.dist, "all_gather", gather)
    rows = [torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1])]
    latents = [torch.tensor([0, 3, 5, 1]), torch.tensor([2, 4, 0])]
    found = []
    for index in (0, 1):
        step = ParallelStep.__new__(ParallelStep)
        step._rank = Rank(index, 2)
        step.state = type("State", (), {"W_enc": torch.zeros(6, 3)})()  # pyright: ignore[reportAttributeAccessIssue]
        kept = step._of_all(Kept(rows[index].int(), latents[index].int(), acts[index]), 4)
        found.append(sorted(zip(kept.rows.tolist(), kept.latents.tolist(), kept.acts.tolist(), strict=True)))
    assert found == [[(0, 5, 1.0), (1, 0, 2.0), (1, 3, 1.0)], [(0, 2, 3.0)]]
