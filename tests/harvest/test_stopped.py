"""Ctrl-C and SIGTERM to a harvest: it says how to go on, and what it says works."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matryoshka.interrupt import SIGNALS

FAR = 120.0


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_it_ends_in_order_and_the_printed_command_goes_on(
    arguments: list[str], finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "a folder" / "l1"
    command = [sys.executable, "-m", "harvest", *arguments, "--out", str(out)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + FAR
        while not list(out.glob("manifest/*.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in said
    assert 1 <= len(list(out.glob("manifest/*.json"))) < 10
    assert not [path for path in out.rglob("*") if ".partial" in path.name]
    words = shlex.split(said.splitlines()[-1])
    assert words[:3] == ["next:", "harvest", "run"]
    again = [sys.executable, "-m", *words[1:]]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=FAR, check=False)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(finished)
