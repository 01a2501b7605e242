"""What a run says of itself: what it used, and what older runs did not write down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.run_facts import NOT_RECORDED, RunFacts, read_run_facts, seconds_of


def _run(folder: Path, record: Any, timing: str = "") -> Path:
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "timing.jsonl").write_text(timing)
    return folder


def test_what_was_used_and_not_what_was_asked_for(tmp_path: Path) -> None:
    record = {
        "config": {"precision": "auto", "device": "auto", "k_aux": None, "input": None, "batch_tokens": 100},
        "identity": {"plan": {"input": "normalized", "k_aux": 64, "lr": 0.0004}},
        "sessions": [
            {"first_step": 0, "device": "cpu", "precision": "fp32", "backend": "sparse", "n_ranks": 1},
            {"first_step": 20, "device": "cuda:0 (T4)", "precision": "fp32", "backend": "dense", "n_ranks": 2},
        ],
        "data": {"dataset": "/home/me/books", "val_unit": "document", "documents": {"train": 1200, "val": 31}},
    }
    lines = [{"step": 10, "tokens_per_second": 10.0}, {"step": 30, "tokens_per_second": 0.5}]
    # After the checkpoint of step 30 the run took ten more steps, and was killed while it wrote of the next ones.
    lines.append({"step": 40, "tokens_per_second": 2.0})
    timing = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50, "tok'
    facts = read_run_facts(_run(tmp_path, record, timing), 30)
    assert facts.seconds == 10 * 100 / 10.0 + 20 * 100 / 0.5
    assert dict(facts.lines()) == {
        "device": "cpu, then 2 x cuda:0 (T4)",
        "precision of the encoder product": "fp32",
        "backend": "sparse, then dense",
        "input convention": "normalized",
        "k_aux": "64",
        "peak learning rate": "0.0004",
        "tokens seen": "3,000",
        "wall time": "1:08:20",
        "dataset": "books",
        "documents": "train 1,200, val 31",
        "held out": "whole documents, which train never saw",
    }


@pytest.mark.parametrize(
    "record", [{}, {"config": {"batch_tokens": "x"}, "sessions": 3, "data": [1], "identity": {"plan": {"lr": "?"}}}]
)
def test_what_a_run_does_not_say_is_not_recorded(tmp_path: Path, record: dict[str, Any]) -> None:
    facts = read_run_facts(_run(tmp_path, record), 7)
    assert facts == RunFacts()
    assert {value for _, value in facts.lines()} == {NOT_RECORDED}
    assert read_run_facts(tmp_path / "nowhere", None) == RunFacts()


def test_seconds_of_lines_that_say_nothing() -> None:
    assert seconds_of([], 10) is None
    assert seconds_of([{"step": 5}], 10) is None
    assert seconds_of([{"step": 5, "tokens_per_second": 25.0}], None) is None
    assert seconds_of([{"step": 5, "tokens_per_second": 25.0}, {"step": 6, "tokens_per_second": 0}], 10) == 2.0
