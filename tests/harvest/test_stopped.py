"""Ctrl-C and SIGTERM to a harvest: it says how to go on, and what it says works."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
from warm_processes import WarmPython

from matryoshka.interrupt import SIGNALS


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.kill
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_it_ends_in_order_and_the_printed_command_goes_on(
    arguments: list[str], finished: Path, tmp_path: Path, number: signal.Signals, warm_python: WarmPython
) -> None:
    out = tmp_path / "a folder" / "l1"
    with warm_python.start(["-m", "harvest", *arguments, "--out", out], tmp_path) as process:
        process.until(lambda: list(out.glob("manifest/*.json")))
        process.send_signal(number)
        assert process.wait() == 128 + number
    said = process.stderr
    assert "Traceback" not in said
    assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in said
    assert 1 <= len(list(out.glob("manifest/*.json"))) < 10
    assert not [path for path in out.rglob("*") if ".partial" in path.name]
    words = shlex.split(said.splitlines()[-1])
    assert words[:3] == ["next:", "harvest", "run"]
    done = warm_python.run(["-m", *words[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(finished)
