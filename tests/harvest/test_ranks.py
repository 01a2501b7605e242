"""Several processes make the very files that one makes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from warm_processes import WarmPython

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
