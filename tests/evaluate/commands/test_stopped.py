"""Ctrl-C and SIGTERM to `evaluate`: a pass saves the batch in hand, and the printed command gives the same bytes."""

from __future__ import annotations

import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm_processes import WarmPython

from matryoshka.shards import ShardSet

pytestmark = pytest.mark.kill

DRIVER = """
import os, sys
from pathlib import Path
number, after, *words = sys.argv[1:]
sys.argv = ["evaluate", *words]
from evaluate.commands.terminal import Terminal
advanced = Terminal.advanced
n_told = 0
def told(self, n_rows):
    global n_told
    advanced(self, n_rows)
    n_told += 1
    if n_told == int(after):
        os.kill(os.getpid(), int(number))
Terminal.advanced = told
from matryoshka.launch import evaluate
evaluate()
"""


@pytest.fixture
def evaluate(warm_python: WarmPython, folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in a process that sends itself a signal when it has been told of progress `after` times."""
    return lambda number, after, *words: warm_python.run(["-c", DRIVER, int(number), after, *words], folder)


@pytest.fixture
def folder(val_set: ShardSet, made: Any, tmp_path: Path) -> Path:
    for name in ("whole", "stopped run"):
        made.run(tmp_path / name, made.transcoder())
    (tmp_path / "l1").symlink_to(val_set.path)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "command", "result", "batch_rows"),
    # `run` reads in batches as large as in training, whatever evaluate.batch_rows says
    [(signal.SIGINT, "run", "report.json", 11), (signal.SIGTERM, "hierarchy", "hierarchy.json", 13)],
)
def test_a_pass_goes_on_after_the_batch_in_hand(
    folder: Path,
    evaluate: Callable[..., subprocess.CompletedProcess[str]],
    number: signal.Signals,
    command: str,
    result: str,
    batch_rows: int,
) -> None:
    options = ["--shards", "l1", "--device", "cpu", "--set", "evaluate.batch_rows=13"]
    options += ["--set", "evaluate.save_minutes=60"]
    if command == "hierarchy":
        options.append("--no-clusters")
    assert evaluate(number, -1, command, "whole", *options).returncode == 0
    stopped = evaluate(number, 4, command, "stopped run", *options)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stdout == ""
    assert not list(folder.glob(f"stopped run/eval/*/{result}"))
    words = shlex.split(stopped.stderr.splitlines()[-1])
    assert words[:4] == ["next:", "evaluate", command, "stopped run"]
    again = evaluate(number, -1, *words[2:])
    assert again.returncode == 0, again.stderr
    assert f"continued after {3 * batch_rows} rows" in again.stderr
    one, other = (next(folder.glob(f"{name}/eval/*/{result}")) for name in ("whole", "stopped run"))
    assert other.read_text().replace("stopped run", "whole") == one.read_text()


def test_a_command_without_a_pass_of_its_own_writes_nothing(
    folder: Path, evaluate: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    words = ["compare", "whole", "stopped run", "--shards", "l1", "--out", "out"]
    stopped = evaluate(signal.SIGINT, 2, *words, "--set", "evaluate.batch_rows=13")
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert not (folder / "out").exists()
    assert "next: evaluate compare whole 'stopped run' --shards l1" in stopped.stderr
