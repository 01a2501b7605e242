"""Publishing, reading, comparing and locking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matryoshka.errors import UserError
from matryoshka.runs import (
    changed_fields,
    check_directory,
    default_run_path,
    default_shards_path,
    exclusive,
    make_directory,
    provenance,
    publish_bytes,
    publish_json,
    read_json,
    refuse_changes,
)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_publish_leaves_what_was_there(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"

    def die(*_: object) -> None:
        raise Killed

    for before in (None, b"old"):
        with monkeypatch.context() as patch:
            patch.setattr(os, where, die)
            with pytest.raises(Killed):
                publish_bytes(path, b"new")
        assert (path.read_bytes() if path.exists() else None) == before
        publish_bytes(path, b"old")
    publish_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "a", []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}"))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    publish_bytes(path, b"x")
    assert events == [f"fsync {path}.partial", "replace", f"fsync {tmp_path}"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    publish_json(tmp_path / "a", {"b": 1, "a": "\u00e9"})
    publish_json(tmp_path / "b", {"a": "\u00e9", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes().isascii()
    with pytest.raises(ValueError, match="JSON compliant"):
        publish_json(tmp_path / "c", {"a": float("nan")})
    assert not (tmp_path / "c").exists()


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(UserError, match=r"is not a run: it has no run\.json"):
        read_json(path, what="run")
    publish_json(path, {"format_version": 1, "x": 2})
    assert read_json(path, what="run") == {"format_version": 1, "x": 2}
    for content in ({"format_version": 2}, {}, [1]):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="has format_version .*this version reads 1"):
            read_json(path, what="run")
    for raw in (b"{", b"\xff", b""):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="cannot be read as the record of a run"):
            read_json(path, what="run")
    with pytest.raises(UserError, match="cannot be read as the record of a run"):
        read_json(tmp_path, what="run")


@pytest.mark.parametrize(
    ("saved", "new", "changes"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"b": 1, "a": "x"}, {"a": None, "b": 2}, ['a: "x" -> null', "b: 1 -> 2"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, ["a.b.d: 2 -> 3"]),
        ({"a": {"b": 1}}, {"a": 1}, ['a: {"b": 1} -> 1']),
        ({"old": 1}, {"new": [1]}, ["new: null -> [1]", "old: 1 -> null"]),
        ({"a": [1, 2]}, {"a": [1, 2]}, []),
    ],
)
def test_changed_fields(saved: dict[str, Any], new: dict[str, Any], changes: list[str]) -> None:
    assert changed_fields(saved, new) == changes


def test_refuse_changes() -> None:
    refuse_changes(Path("data/l17"), "harvested", [])
    with pytest.raises(
        UserError, match=r"^data/l17 was harvested with other settings \(a: 1 -> 2; b: 3 -> 4\)\. Pass --out"
    ):
        refuse_changes(Path("data/l17"), "harvested", ["a: 1 -> 2", "b: 3 -> 4"])


def test_default_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_shards_path(17) == Path("data/l17")
    assert default_run_path(Path("data/l17"), 96) == Path("data/runs/l17-k96")
    monkeypatch.chdir(tmp_path)
    # Beside the set here too: `.` has no name, so its folder is written out.
    assert default_run_path(Path("."), 3) == tmp_path.resolve().parent / "runs" / f"{tmp_path.name}-k3"


def test_directories(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    check_directory(tmp_path / "x" / "y")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("x")
    for check in (check_directory, make_directory):
        for bad in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UserError, match="cannot be made .*choose another --out"):
                check(bad)


def test_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    for check in (check_directory, make_directory):
        with pytest.raises(UserError, match="is not writable"):
            check(tmp_path)


HOLD = """
import sys
from pathlib import Path
from matryoshka.runs import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.process
def test_a_second_holder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being written by another process"), exclusive(tmp_path):
            pass
        other.kill()  # however it ends
        other.wait()
    with exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_a_disk_without_locks_is_not_called_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UserError, match="cannot lock files"), exclusive(tmp_path):
        pass


def test_provenance_is_json_and_names_versions() -> None:
    facts = json.loads(json.dumps(provenance()))
    assert facts["versions"]["torch"]
    assert facts["versions"]["matryoshka-transcoders"]
    assert facts["git_commit"] is None or len(facts["git_commit"]) == 40
