"""The command as a person types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matryoshka import launch
from matryoshka.shards import ShardSet

ROOT = Path(__file__).parents[2]


def test_run_prints_a_table_and_then_has_nothing_left_to_do(
    val_set: ShardSet, made: Any, tmp_path: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    made.run(tmp_path / "l1-k9", made.transcoder(), finished=False)
    words = ("evaluate", "run", "l1-k9", "--shards", val_set.path, "--tokens", "50", "--device", "cpu")
    first = typed(*words, "--set", "evaluate.batch_rows=16")
    assert first.returncode == 0, first.stderr
    for text in ("FVU", "L0", "cosine", "dead", "50 held-out rows", "l1-k9, step 400"):
        assert text in first.stdout
    assert "not trained to its end: this is step 400" in first.stderr
    assert "written" in first.stderr
    again = typed(*words, "--set", "evaluate.batch_rows=16")
    assert again.stdout == first.stdout
    assert "nothing left to do" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing"], "error: nothing is not a folder"),
        (["run", "nothing", "--tokens", "many"], "error: bad evaluate settings: tokens: expected a number such as 15M"),
        (["compare", "nothing"], "error: a comparison needs two transcoders"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    val_set: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate", *words, "--shards", str(val_set.path)])
    with pytest.raises(SystemExit) as ended:
        launch.evaluate()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_compare_prints_a_table(
    val_set: ShardSet,
    made: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runs = [str(made.run(tmp_path / name, made.transcoder(seed=seed))) for seed, name in enumerate(("one", "two"))]
    words = ["compare", *runs, "--shards", str(val_set.path), "--device", "cpu", "--l0", "15,16.5"]
    monkeypatch.setattr("sys.argv", ["evaluate", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        launch.evaluate()
    assert ended.value.code == 0
    shown = capsys.readouterr()
    for text in ("one", "two", "16.5", "minus first"):
        assert text in shown.out
    assert (tmp_path / "out" / "comparison.json").is_file()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, evaluate.cli\n"
        "heavy = {'torch', 'zarr', 'numpy', 'rich.progress', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_hierarchy_match_and_layers_as_typed(
    val_set: ShardSet, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run = str(made.run(tmp_path / "one", made.transcoder()))
    shards = ["--shards", str(val_set.path), "--device", "cpu"]
    for words, shown in (
        (["hierarchy", run, *shards, "--no-clusters", "--prefix", "2"], ("FVU without any latent", "implied", "17")),
        (["match", run, f"{run}@2", *shards, "--out", str(tmp_path / "out")], ("one@2", "correlation", "mutual")),
        (["run", run, *shards, "--split", "train"], ("TRAIN rows",)),
        (["run", run, *shards], ("held-out rows",)),
        (["layers", run, "--out", str(tmp_path / "out")], ("layer", "one", "48")),
    ):
        monkeypatch.setattr("sys.argv", ["evaluate", *words])
        with pytest.raises(SystemExit) as ended:
            launch.evaluate()
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        for text in shown:
            assert text in said.out, (words, said.out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"matching.json", "matches.parquet", "layers.json"}


def test_a_prefix_that_is_not_there_is_a_sentence(
    val_set: ShardSet, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(made.run(tmp_path / "one", made.transcoder()))
    monkeypatch.setattr("sys.argv", ["evaluate", "run", run, "--shards", str(val_set.path), "--prefix", "9"])
    with pytest.raises(SystemExit) as ended:
        launch.evaluate()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: there is no prefix 9: this transcoder has 3 nested groups, 1 (6 latents), "
    )
