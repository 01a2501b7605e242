"""The command `harvest` in this process, on a tiny Gemma-2 that is loaded once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm_processes import WarmPython

from matryoshka import launch
from matryoshka.lm import LanguageModel

Cli = Callable[..., tuple[int, str, str]]
Harvest = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def arguments(tiny_gemma2: Path, tiny_text: Path) -> list[str]:
    """`harvest run` of 4000 tokens in contexts of 16: 9 shards of train, 1 of val; no --out."""
    return [
        *("run", "--layer", "1", "--model", str(tiny_gemma2), "--dataset", str(tiny_text)),
        *("--tokens", "4k", "--ctx-len", "16", "--batch-size", "7", "--dtype", "fp32", "--device", "cpu"),
        *("--set", "harvest.val_fraction=0.1"),
    ]


@pytest.fixture(scope="session")
def lm(tiny_gemma2: Path) -> LanguageModel:
    """The model that every harvest in this process runs."""
    return LanguageModel.load(str(tiny_gemma2), dtype="fp32", device="cpu")


@pytest.fixture
def cli(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """A function: arguments of the command `harvest` -> (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harvest", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            launch.harvest()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: lm)
    return run


@pytest.fixture
def harvest(cli: Cli, arguments: list[str], tmp_path: Path) -> Harvest:
    """A function: what to add to `harvest run ...` -> (exit code, stderr)."""

    def run(*extra: str, out: Path | None = None) -> tuple[int, str]:
        code, said, err = cli(*arguments, "--out", str(out or tmp_path / "out"), *extra)
        assert said == ""
        return code, err

    return run


@pytest.fixture(scope="session")
def finished(arguments: list[str], lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of `arguments`, to be copied by tests that damage it."""
    from harvest.config import HarvestConfig
    from harvest.run import harvest

    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    del options["--set"]
    settings = {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
    out = tmp_path_factory.mktemp("finished") / "l1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", lambda *_, **__: lm)
        harvest(HarvestConfig.model_validate({**settings, "val_fraction": 0.1, "out": out}))
    return out


@pytest.fixture(scope="session")
def done(arguments: list[str], warm_python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted harvest in a process of its own, and what it said; away from the checkout's pipeline.yaml."""
    folder = tmp_path_factory.mktemp("done")
    finished = warm_python.run(["-m", "harvest", *arguments, "--out", str(folder / "l1")], folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
    return folder / "l1", finished.stderr


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, harvest: Harvest) -> Harvest:
    """The fixture `harvest`, where loading the model would already be a waste of time."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(LanguageModel, "load", load)
    return harvest
