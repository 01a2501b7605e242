"""metrics.jsonl survives kills; Weights & Biases writes offline files."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_wandb_offline_leaves_its_files(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, mode="offline", project="test", config={"k": 4})
    sink.log(1, {"loss": 0.5}, {"data_wait": 0.0})
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 0
