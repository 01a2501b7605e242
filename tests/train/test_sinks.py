"""metrics.jsonl survives kills; Weights & Biases writes offline files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from train.config import TrainConfig
from train.run import train_fleet
from train.sinks import JsonlSink, WandbSink


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


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of an offline file: after 7 bytes of header a LevelDB log of 32 KiB blocks, in which each
    fragment is crc (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last) and payload."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, held = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            yield record
            held = b""


def whole(path: Path) -> list[Any]:
    """All records of a finished run; wandb's own process may still be writing the last of them."""
    for _ in range(300):
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def history(path: Path) -> list[dict[str, float]]:
    """What was logged, a dict for each step."""
    found = [record.history.item for record in whole(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in found]


def artifacts(path: Path) -> list[Any]:
    return [
        record.request.log_artifact.artifact if record.request.HasField("log_artifact") else record.artifact
        for record in whole(path)
        if record.WhichOneof("record_type") == "artifact"
        or (record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"))
    ]


def test_wandb_offline_leaves_its_files(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, mode="offline", project="test", config={"k": 4})
    sink.log(1, {"loss": 0.5}, {"data_wait": 0.0})
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (line,) = history(file)
    assert (line["_step"], line["loss"], line["data_wait"]) == (1, 0.5, 0.0)


def test_a_finished_run_becomes_an_artifact_without_its_optimizer(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    for name in ("config.json", "transcoder.safetensors", "optimizer.safetensors"):
        (checkpoint / name).write_text(name)
    sink = WandbSink(tmp_path / "run", mode="offline", project="test", config={"k": 4})
    sink.log(1, {"loss": 0.5}, {})
    sink._uploads = True  # as online, but into the offline file: there is no server here
    sink.close(checkpoint)
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    (artifact,) = artifacts(file)
    assert (artifact.type, artifact.name) == ("model", "run-transcoder")
    assert sorted(entry.path for entry in artifact.manifest.contents) == ["config.json", "transcoder.safetensors"]


def test_offline_nothing_is_copied(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, mode="offline", project="test", config={})
    sink.log(1, {"loss": 0.5}, {})
    sink.close(tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert artifacts(file) == []


def test_every_member_of_a_fleet_has_the_promised_metrics(run_settings: dict[str, Any], tmp_path: Path) -> None:
    fleet = [{"name": "a"}, {"name": "b", "group_sizes": [8, 8, 8, 24]}]
    train_fleet(TrainConfig.model_validate(run_settings | {"out": tmp_path, "wandb": "offline", "fleet": fleet}))
    for name, n_groups in (("a", 3), ("b", 4)):
        (file,) = (tmp_path / name).glob("wandb/offline-run-*/*.wandb")
        logged, saved = history(file), lines(tmp_path / name / "metrics.jsonl")
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
        (run,) = [record.run for record in whole(file) if record.WhichOneof("record_type") == "run"]
        assert (run.run_group, run.display_name) == (tmp_path.name, name)
