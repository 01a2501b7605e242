"""What the tests of language models share."""

from __future__ import annotations

import os
import subprocess

import pytest


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts a process fails: libraries have run `pip install` when a model was loaded."""

    def refuse(*args: object, **_: object) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for name in ("system", "popen", "posix_spawn", "posix_spawnp", "execv", "execve", "fork"):
        monkeypatch.setattr(os, name, refuse)
