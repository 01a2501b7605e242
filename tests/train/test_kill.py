"""kill -9, SIGTERM and Ctrl-C on a real process: what is on the disk afterwards is enough to go on bit for bit.

MATRYOSHKA_KILLS=20 repeats the kills that often; the few of the normal run take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm_processes import WarmPython

from matryoshka.checkpoints import list_checkpoints

pytestmark = pytest.mark.kill
N_KILLS = int(os.environ.get("MATRYOSHKA_KILLS", "2"))
LIST = [
    {"name": "plain"},
    {"name": "wide", "group_sizes": [8, 88], "lr": 1e-3, "steps": 70, "checkpoint_every": 3},
    {
        "name": "other",
        "k": 2,
        "seed": 3,
        "input": "resid_mid",
        "condition": "standardise",
        "skip": True,
        "k_start": 6,
        "sampled_prefixes": 3,
    },
]

# Arms itself at a step and ends the process a little later: in a step, in a log line, or while a checkpoint is written.
DRIVER = """
import json, os, signal, sys, threading
from train.config import TrainConfig
from train.progress import NoProgress
from train.run import train_fleet

settings, step, delay, number = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])

class Killer(NoProgress):
    taken = 0
    def advanced(self, name, done, report):
        self.taken += 1
        if self.taken == step:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start() if delay else os.kill(os.getpid(), number)

result = train_fleet(TrainConfig.model_validate(settings), Killer())
print(result.stopped_by)
sys.exit(7 if result.stopped_by is not None else 0)
"""


@pytest.fixture
def start(warm_python: WarmPython, tmp_path: Path) -> Callable[..., int]:
    """Train in a process of its own that sends itself a signal `delay` seconds after its `step`-th step."""

    def run(settings: dict[str, Any], step: int = -1, delay: float = 0.0, number: int = signal.SIGKILL) -> int:
        words = ["-c", DRIVER, json.dumps(settings), str(step), str(delay), str(int(number))]
        done = warm_python.run(words, tmp_path)
        assert done.returncode in (0, 7, -signal.SIGKILL), done.stderr
        return done.returncode

    return run


def learned(folder: Path) -> dict[str, bytes]:
    """Final weights, optimizer state and metrics of every run below `folder`."""
    found = {}
    for metrics in sorted(folder.rglob("metrics.jsonl")):
        run = metrics.parent
        last = list_checkpoints(run)[-1]
        assert last.is_finished
        for path in (metrics, *(last.folder / name for name in ("transcoder.safetensors", "optimizer.safetensors"))):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("fleet", [None, LIST], ids=["one", "three"])
@pytest.mark.timeout(3600)
def test_killed_at_random_steps_and_resumed(
    run_settings: dict[str, Any], tmp_path: Path, fleet: list[dict[str, Any]] | None, start: Callable[..., int]
) -> None:
    n_steps = 10 * N_KILLS
    settings = run_settings | {"steps": n_steps, "log_every": 1, "checkpoint_every": 4, "fleet": fleet}
    assert start(settings | {"out": str(tmp_path / "whole")}) == 0
    expected = learned(tmp_path / "whole")
    assert len(expected) == 3 * (1 if fleet is None else 3)
    killed = settings | {"out": str(tmp_path / "killed")}
    rng = random.Random(20)
    n_killed = 0
    for number in range(N_KILLS):
        # On average as far as the checkpoints let it come, so that the kills spread over the run. The threads that
        # read change on the way, which must not be seen either.
        step = rng.randint(1, 14) * (1 if fleet is None else 3)
        killed["readers"] = 1 if number % 2 else 4
        n_killed += start(killed, step, rng.random() * 0.02) != 0
    assert n_killed >= max(1, N_KILLS // 2)
    assert start(killed) == 0
    assert learned(tmp_path / "killed") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_in_hand(
    run_settings: dict[str, Any], tmp_path: Path, number: signal.Signals, start: Callable[..., int]
) -> None:
    settings = run_settings | {"checkpoint_every": 1000, "log_every": 1, "fleet": LIST[:2]}
    assert start(settings | {"out": str(tmp_path / "whole")}) == 0
    stopped = settings | {"out": str(tmp_path / "stopped")}
    assert start(stopped, 11, number=number) == 7
    # The eleventh step of the two in turn is the sixth of the first; the batch in hand goes through both.
    assert [list_checkpoints(tmp_path / "stopped" / name)[-1].step for name in ("plain", "wide")] == [6, 6]
    assert start(stopped) == 0
    assert learned(tmp_path / "stopped") == learned(tmp_path / "whole")


def test_the_command_says_that_it_was_stopped(
    run_settings: dict[str, Any], tmp_path: Path, warm_python: WarmPython
) -> None:
    """`pipeline run` must not take an interrupted training for a finished one."""
    config = tmp_path / "p.yaml"
    settings = run_settings | {
        "steps": 100_000,
        "checkpoint_every": 1_000_000,
        "out": str(tmp_path / "run"),
        "log_every": 1,
    }
    config.write_text(json.dumps({"train": settings}))
    metrics = tmp_path / "run" / "metrics.jsonl"
    with warm_python.start(["-m", "train", "run", "--config", config], tmp_path) as process:
        process.until(lambda: metrics.exists() and metrics.stat().st_size)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, process.stderr
    said = process.stderr
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert f"stopped after step {checkpoint.step} of 100000" in " ".join(said.split())
