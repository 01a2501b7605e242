"""The four commands as a person types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matryoshka import launch


@pytest.fixture
def command(
    subject: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int | str | None, str, str]]:
    """(exit code, stdout, stderr) of a command on a copy of a run, in an empty folder."""
    one = subject("gemma2")
    shutil.copytree(one.run, tmp_path / "l1-k6")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(name: str, *words: str) -> tuple[int | str | None, str, str]:
        line = ["evaluate", name, "l1-k6", *words, "--shards", str(one.shards.path), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", line)
        with pytest.raises(SystemExit) as ended:
            launch.evaluate()
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


def test_faithfulness(command: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = command("faithfulness", "--tokens", "30")
    assert code == 0, err
    for text in ("as it is", "zero", "mean", "y_hat of 31", "top-1", "3 val contexts"):
        assert text in out
    (file,) = tmp_path.glob("l1-k6/eval/*/faithfulness.json")
    assert json.loads(file.read_text())["settings"]["tokens"] == 30
    code, out_again, err = command("faithfulness", "--tokens", "30")
    assert out_again == out
    assert "nothing left to do" in err
    code, out, err = command("faithfulness", "--tokens", "30", "--prefix", "1")
    assert "y_hat of 5" in out
    assert "y_hat of 14" not in out
    assert (file.parent / "prefix-1" / "faithfulness.json").is_file()
    code, out, err = command("faithfulness", "--tokens", "30", "--error-term")
    assert "faithfulness-with-error.json: written" in err


def test_logits_and_ablate(command: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = command("logits")
    assert code == 0, err
    assert "logits.json: written" in err
    code, out, err = command("ablate", "7", "0", "--scale", "2", "--tokens", "40")
    assert code == 0, err
    assert "activations times 2 at blocks.1.hook_mlp_out" in out
    files = sorted(path.name for path in tmp_path.glob("l1-k6/eval/*/ablations/*"))
    assert files == ["0.json", "7.json"]


def test_steer(command: Callable[..., Any]) -> None:
    code, out, err = command("steer", "7", "--text", "w1 [bold]w2", "--tokens", "3", "--temperature", "0.5")
    assert code == 0, err
    assert out.count("w1 [bold]w2") == 2  # brackets are no markup


def test_tables_are_readable(
    subject: Callable[[str], Any], tmp_path: Path, check_readable: Callable[..., None]
) -> None:
    one = subject("gpt2")
    shutil.copytree(one.run, tmp_path / "l1-k6")
    (tmp_path / "set").symlink_to(one.shards.path)
    commands = [["faithfulness", "l1-k6"], ["logits", "l1-k6"], ["ablate", "l1-k6", "7", "0", "20"]]
    check_readable([["evaluate", *words, "--shards", "set", "--device", "cpu"] for words in commands], tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("faithfulness", "--model", "off"), "The configuration of the model in the folder off"),
        (("faithfulness", "--tokens", "many"), "error: bad evaluate settings: faithfulness.tokens"),
        (("faithfulness", "--prefix", "4"), "3 nested groups"),
        (("ablate", "99"), "no latent 99"),
        (("steer", "7", "--text", ""), "the text has no tokens"),
    ],
)
def test_a_mistake_is_one_paragraph(
    words: tuple[str, ...], message: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "off").mkdir()  # a name that YAML would take for false
    code, out, err = command(*words)
    assert code == 2
    assert message in err
    assert out == ""
