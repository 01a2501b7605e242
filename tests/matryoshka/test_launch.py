"""The doors of the commands: whose package it is, and how a failure ends."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from matryoshka import launch
from matryoshka.errors import UserError


def test_our_own_packages_pass() -> None:
    for name in ("harvest", "train", "evaluate", "matryoshka"):
        launch.check_package(name)


def test_a_foreign_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "evaluate").mkdir(parents=True)
    (tmp_path / "site" / "evaluate" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    with pytest.raises(UserError, match=r"'evaluate' that Python finds is at .*site/evaluate/__init__.*pip install -e"):
        launch.check_package("evaluate")


def test_the_old_notes_of_an_editable_install_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install -e` writes the files of that day into the checkout; a `git pull` later there are others."""
    for package in launch.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "new.py").touch()
    notes = tmp_path / "matryoshka_transcoders.egg-info"
    notes.mkdir()
    (notes / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: matryoshka-transcoders\nVersion: 0.1.0\n")
    (notes / "SOURCES.txt").write_text("train/gone.py\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m train` and torchrun do in the checkout
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "matryoshka" / "launch.py"))
    launch.check_installation()


def test_an_absent_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="evaluate"):
        launch.check_package("evaluate")


def run(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def app(**_: Any) -> None:
        if error is not None:
            raise error

    module = ModuleType("harvest.cli")
    module.app = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "harvest.cli", module)
    launch.harvest()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no such layer;\n  choose another"), "error: no such layer; choose another\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            "error: No space left on device: a/b; free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied: a file; "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
            "error: the memory of the device is not enough: CUDA out of memory. Tried to allocate 2 GiB.; use smaller",
        ),
    ],
)
def test_what_a_user_can_correct_is_one_paragraph(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(error, monkeypatch)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("our bug"), OSError(errno.EBADF, "our bug"), AssertionError()])
def test_our_own_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        run(error, monkeypatch)


def test_success_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(None, monkeypatch)
    assert capsys.readouterr() == ("", "")
