"""Several processes make the very files that one makes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from warm_processes import WarmPython

from harvest.ranks import Ranks
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def torchrun(n: int, arguments: list[str], cwd: Path) -> str:
    """The same, as a user starts it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    # torchrun gives several processes one thread each; one process must have as many for the bits to be the same.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "harvest", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def harvest(n: int, arguments: list[str], cwd: Path, python: WarmPython) -> str:
    """On so many ranks; what they said."""
    return python.run_ranks(["-m", "harvest", *arguments], cwd, n)


@pytest.mark.torchrun
def test_the_set_does_not_depend_on_the_number_of_processes(
    arguments: list[str], tmp_path: Path, warm_python: WarmPython
) -> None:
    """Two of them as a user starts them."""
    base = [*arguments[:1], "--layers", "0,1", *arguments[3:]]
    found = {}
    for n in (1, 2, 3):
        out = tmp_path / f"n{n}"
        words = [*base, "--out", str(out)]
        said = torchrun(n, words, tmp_path) if n == 2 else harvest(n, words, tmp_path, warm_python)
        assert said.count("\nnext: ") == 1  # the first rank speaks for all
        found[n] = files(out)
    assert set(found[1]) == set(found[2]) == set(found[3])
    for name, content in found[1].items():
        assert content == found[2][name] == found[3][name], name
    ShardSet.open(tmp_path / "n3" / "l1", verify=True)


@pytest.mark.kill
def test_ended_ranks_are_continued_by_another_number_of_them(
    arguments: list[str], finished: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    """torchrun ends its ranks with SIGTERM."""
    out = tmp_path / "l1"
    words = [*arguments, "--out", str(out)]
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(rank) for rank in warm_python.start_ranks(["-m", "harvest", *words], tmp_path, 2)]
        ranks[0].until(lambda: list(out.glob("manifest/*.json")))
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        codes = [rank.wait() for rank in ranks]
    assert all(codes), "they had finished"
    harvest(3, words, tmp_path, warm_python)
    assert files(out) == files(finished)


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
