"""metrics.jsonl survives kills; Weights & Biases writes offline files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.config import TrainConfig
from train.run import train_fleet
from train.sinks import JsonlSink, WandbSink

Records = Callable[[Path], list[Any]]


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_steps_to_be_done_again_are_dropped(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, 0)
    for step in (10, 20, 30):
        sink.log(step, {"loss": 1 / step}, {"tokens_per_second": step})
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    sink = JsonlSink(tmp_path, 20)
    sink.log(30, {"loss": 7.0}, {"tokens_per_second": 1.0})
    sink.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 0.1},
        {"step": 20, "loss": 0.05},
        {"step": 30, "loss": 7.0},
    ]
    assert [line["step"] for line in lines(tmp_path / "timing.jsonl")] == [10, 20, 30]


def history(records: Records, path: Path) -> list[dict[str, float]]:
    """What was logged, a dict for each step."""
    found = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in found]


def artifacts(records: Records, path: Path) -> list[Any]:
    return [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]


def test_wandb_offline_leaves_its_files(tmp_path: Path, wandb_records: Records) -> None:
    sink = WandbSink(tmp_path, mode="offline", project="test", config={"k": 4})
    sink.log(1, {"loss": 0.5}, {"data_wait": 0.0})
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (line,) = history(wandb_records, file)
    assert (line["_step"], line["loss"], line["data_wait"]) == (1, 0.5, 0.0)


def test_a_finished_run_becomes_an_artifact_without_its_optimizer(tmp_path: Path, wandb_records: Records) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    for name in ("config.json", "transcoder.safetensors", "optimizer.safetensors"):
        (checkpoint / name).write_text(name)
    sink = WandbSink(tmp_path / "run", mode="offline", project="test", config={"k": 4})
    sink.log(1, {"loss": 0.5}, {})
    sink._uploads = True  # as online, but into the offline file: there is no server here
    sink.close(checkpoint)
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    (artifact,) = artifacts(wandb_records, file)
    assert (artifact.type, artifact.name) == ("model", "run-transcoder")
    assert sorted(entry.path for entry in artifact.manifest.contents) == ["config.json", "transcoder.safetensors"]


def test_a_failure_of_wandb_comes_before_anything_is_written(run_settings: dict[str, Any], tmp_path: Path) -> None:
    # In a process of its own, that knows no key: what wandb has looked up it keeps.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = ["-m", "train", "run", "--shards", run_settings["shards"], "--group-sizes", "8,16,24", "--k", "4"]
    command += ["--steps", "1", "--batch-tokens", "128", "--out", str(tmp_path / "run"), "--wandb", "online"]
    done = subprocess.run(
        [sys.executable, *command],
        env={**environment, "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Weights & Biases could not start (" in done.stderr
    assert "Log in with `wandb login`, or use --wandb offline" in done.stderr
    assert not (tmp_path / "run").exists()


def test_offline_nothing_is_copied(tmp_path: Path, wandb_records: Records) -> None:
    sink = WandbSink(tmp_path, mode="offline", project="test", config={})
    sink.log(1, {"loss": 0.5}, {})
    sink.close(tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert artifacts(wandb_records, file) == []


def test_every_member_of_a_fleet_has_the_promised_metrics(
    run_settings: dict[str, Any], tmp_path: Path, wandb_records: Records
) -> None:
    fleet = [{"name": "a"}, {"name": "b", "group_sizes": [8, 8, 8, 24]}]
    train_fleet(TrainConfig.model_validate(run_settings | {"out": tmp_path, "wandb": "offline", "fleet": fleet}))
    for name, n_groups in (("a", 3), ("b", 4)):
        (file,) = (tmp_path / name).glob("wandb/offline-run-*/*.wandb")
        logged, saved = history(wandb_records, file), lines(tmp_path / name / "metrics.jsonl")
        assert [line["_step"] for line in logged] == [line["step"] for line in saved] == list(range(3, 25, 3))
        for ours, theirs in zip(saved, logged, strict=True):
            groups = [value for key, value in ours.items() if key.startswith("fvu/prefix_")]
            assert len(groups) == n_groups
            expected = {
                "loss": ours["loss"],
                "l2_loss": ours["l2_loss"],
                "l0_norm": ours["l0"],
                "fvu": ours["fvu"],
                "group_fvu_min": min(groups),
                "group_fvu_mean": sum(groups) / n_groups,
                "group_fvu_max": max(groups),
                "dead_features_percentage": 100 * ours["dead_share"],
                "learning_rate": ours["lr"],
            }
            assert {key: theirs[key] for key in expected} == pytest.approx(expected)
        (run,) = [record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run"]
        assert (run.run_group, run.display_name) == (tmp_path.name, name)
