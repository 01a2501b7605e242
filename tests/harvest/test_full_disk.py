"""A real disk that is full in the middle: one sentence, and more room is all that it takes to go on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet

Harvest = Callable[..., tuple[int, str]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 500 kB, in memory; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command here: {error}")
    if done.returncode != 0:
        pytest.skip(f"no right to mount a small disk: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_full_in_the_middle(
    harvest: Harvest, finished: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "l1"
    code, said = harvest(out=out)
    assert code == 2
    assert "this harvest needs about" in said  # refused before it starts
    assert not out.exists()
    usage = shutil.disk_usage(small_disk)
    with monkeypatch.context() as patch:
        # as if something else had filled it since
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        code, said = harvest(out=out)
    assert code == 2
    assert "Traceback" not in said
    assert "No space left on device); free some space or fix the disk and run the same command again" in said
    n_committed = len(list(out.glob("manifest/*.json")))
    assert 1 <= n_committed < 10
    with pytest.raises(UserError, match="unfinished"):
        ShardSet.open(out)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    code, said = harvest(out=out)
    assert code == 0, said
    assert f"{10 - n_committed} shards written" in said
    assert files(out) == files(finished)
