"""Several processes make the very files that one makes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harvest.ranks import Ranks
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet

FAR = 240.0
"""Seconds after which processes that should have ended are given up."""


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def torchrun(n: int, arguments: list[str], cwd: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-addr", "127.0.0.1"]
    del cwd
    return [sys.executable, *launcher, "--master-port", str(port), "-m", "harvest", *arguments]


def start(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    # torchrun gives several processes one thread each; one process must have as many for the bits to be the same.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=FAR)


def test_the_set_does_not_depend_on_the_number_of_processes(arguments: list[str], tmp_path: Path) -> None:
    base = [*arguments[:1], "--layers", "0,1", *arguments[3:]]
    found = {}
    for n in (1, 2, 3):
        out = tmp_path / f"n{n}"
        done = start(torchrun(n, [*base, "--out", str(out)], tmp_path), tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\nnext: ") == 1  # the first rank speaks for all
        found[n] = files(out)
    assert set(found[1]) == set(found[2]) == set(found[3])
    for name, content in found[1].items():
        assert content == found[2][name] == found[3][name], name
    ShardSet.open(tmp_path / "n3" / "l1", verify=True)


def test_killed_ranks_are_continued_by_another_number_of_them(arguments: list[str], tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    assert start(torchrun(1, [*arguments, "--out", str(wanted)], tmp_path), tmp_path).returncode == 0
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun(2, [*arguments, "--out", str(out)], tmp_path)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + FAR
        while not list(out.glob("manifest/*.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.005)
        process.terminate()  # torchrun ends its ranks
        process.communicate(timeout=FAR)
    again = start(torchrun(3, [*arguments, "--out", str(out)], tmp_path), tmp_path)
    assert again.returncode == 0, again.stderr
    assert files(out) == files(wanted)


def test_jobs_are_dealt_in_turn() -> None:
    for world in (1, 2, 3):
        owners = [[rank for rank in range(world) if Ranks(rank, world).owns(job)] for job in range(10)]
        assert owners == [[job % world] for job in range(10)]
    assert [Ranks(rank, 2).is_first for rank in range(2)] == [True, False]


def test_the_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(5, 8, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices = [Ranks.from_environment().device(name) for name in ("auto", "cuda", "cpu", "cuda:3")]
    assert devices == ["cuda:1", "cuda:1", "cpu", "cuda:3"]
    assert Ranks().device("auto") == "auto"
    for value, what in (("8", "RANK is 8 of WORLD_SIZE 8"), ("x", "should be numbers, as torchrun")):
        monkeypatch.setenv("RANK", value)
        with pytest.raises(UserError, match=what):
            Ranks.from_environment()


def test_a_single_process_waits_for_nobody() -> None:
    ranks = Ranks()
    with ranks.joined():
        ranks.wait()
        assert ranks.agree(7) == 7
