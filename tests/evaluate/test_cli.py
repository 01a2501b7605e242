"""The command as a person types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from matryoshka.shards import ShardSet

ROOT = Path(__file__).parents[2]


def command(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from matryoshka.launch import evaluate; evaluate()"
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "120"},
        check=False,
    )


def test_run_prints_a_table_and_then_has_nothing_left_to_do(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    made.run(tmp_path / "l1-k9", made.transcoder(), finished=False)
    words = ("run", "l1-k9", "--shards", val_set.path, "--tokens", "50", "--device", "cpu")
    first = command(*words, "--set", "evaluate.batch_rows=16", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    for text in ("FVU", "L0", "cosine", "dead", "50 held-out rows", "l1-k9, step 400"):
        assert text in first.stdout
    assert "not trained to its end: this is step 400" in first.stderr
    assert "written" in first.stderr
    again = command(*words, "--set", "evaluate.batch_rows=16", cwd=tmp_path)
    assert again.stdout == first.stdout
    assert "nothing left to do" in again.stderr


def test_a_mistake_is_one_paragraph_and_exit_code_2(val_set: ShardSet, tmp_path: Path) -> None:
    failed = command("run", "nothing", "--shards", val_set.path, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: nothing is not a folder")
    assert "Traceback" not in failed.stderr
    failed = command("run", "nothing", "--shards", val_set.path, "--tokens", "many", cwd=tmp_path)
    assert failed.returncode == 2
    assert "expected a number such as 15M" in failed.stderr


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, evaluate.cli\n"
        "heavy = {'torch', 'zarr', 'numpy', 'rich.progress', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
