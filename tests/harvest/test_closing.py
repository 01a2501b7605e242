"""What a harvest says at its end, and the next command."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from harvest.closing import close
from harvest.sets import HarvestResult

MEASURED = {"compression_ratio": 0.688}


def made(name: str, n_shards: int = 10, **errors: float) -> HarvestResult:
    return HarvestResult(Path("my data") / name, n_shards, 4_000, 4_000, 6_384_000, {**MEASURED, **errors})


def test_one_set(capsys: pytest.CaptureFixture[str]) -> None:
    close([made("l1")], Path("own.yaml"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "my data/l1: 10 shards written (4,000 tokens, 6 MB, 1596 bytes per token)"
    words = ["next:", "train", "run", "--shards", "my data/l1", "--config", "own.yaml"]
    assert shlex.split(err.splitlines()[-1]) == words


def test_thirty_sets_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    close([made(f"l{layer}", source_error=0.01, target_error=0.02) for layer in range(30)])
    out, err = capsys.readouterr()
    assert len(re.findall(r"^my data/l\d+ +10 +4,000 +6 MB +1,596 +0\.688 +2\.00%$", out, re.MULTILINE)) == 30
    assert len(err.splitlines()) == 2
    assert "nothing left to do" not in err


def test_sets_that_were_finished_before(capsys: pytest.CaptureFixture[str]) -> None:
    close([made("l1", 0), made("l2", 0)])
    assert "nothing left to do" in capsys.readouterr().err


def test_held_out_blocks_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    close([made("l1")])
    assert "blocks" not in capsys.readouterr().err
    close([replace(made("l1"), val_unit="block")])
    said = "my data/l1: val is made of held-out blocks; train has other parts of the same documents"
    assert said in capsys.readouterr().err.splitlines()
