"""The owner's commands, as written, through the real entry points, on a tiny random Gemma-2 and random text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zarr
from warm_processes import WarmPython

from matryoshka import ShardSet, Transcoder

CONFIG = """
harvest:
  model: {model}
  dataset: {text}
  tokens: 6k
  ctx_len: 32
  val_fraction: 0.15
train:
  group_sizes: [8, 16, 32]
  k: 4
  steps: 60
  batch_tokens: 256
  lr: 3.0e-3
"""


def command(name: str, *arguments: str, cwd: Path, python: WarmPython) -> subprocess.CompletedProcess[str]:
    """Run a console script of this environment, without a network."""
    words = [Path(sys.executable).with_name(name), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    if name == "pipeline":  # and what it starts, in interpreters of their own
        return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    return python.run(words, cwd, environment=environment)


FILE = ("--config", "pipeline.yaml")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_gemma2: Path, tiny_text: Path) -> Path:
    """A folder with a pipeline.yaml, as a user would have it."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "pipeline.yaml").write_text(CONFIG.format(model=tiny_gemma2, text=tiny_text))
    return folder


def test_the_three_commands_and_the_pipeline(workplace: Path, warm_python: WarmPython) -> None:
    harvested = command("harvest", "run", "--layer", "1", "--tokens", "6k", *FILE, cwd=workplace, python=warm_python)
    assert harvested.returncode == 0, harvested.stderr
    trained = command("train", "run", "--shards", "data/l1", *FILE, cwd=workplace, python=warm_python)
    assert trained.returncode == 0, trained.stderr
    run = workplace / "data/runs/l1-k4"
    evaluated = command(
        "evaluate", "run", "data/runs/l1-k4", "--shards", "data/l1", *FILE, cwd=workplace, python=warm_python
    )
    assert evaluated.returncode == 0, evaluated.stderr

    shards = ShardSet.open(workplace / "data/l1", verify=True)
    assert shards.train.n_contexts + shards.val.n_contexts == 188  # ceil(6000 / 32)
    assert "source (8, 32, 20, 24) uint16" in str(zarr.open(str(workplace / "data/l1")).tree(plain=True))
    transcoder = Transcoder.load(run / "checkpoints/step-000060")
    assert transcoder.config.source_hook == "blocks.1.hook_resid_mid"
    assert transcoder.config.target_hook == "blocks.1.hook_mlp_out"
    (report_file,) = run.glob("eval/l1-*/report.json")
    before = report_file.read_bytes()
    report = json.loads(before)
    fvu = [prefix["fvu"] for prefix in report["threshold"]]
    assert fvu == sorted(fvu, reverse=True)
    assert fvu[-1] < 1

    # The same from one file: every stage finds its work done, and no byte changes.
    text = (workplace / "pipeline.yaml").read_text().replace("harvest:\n", "harvest:\n  layer: 1\n")
    (workplace / "again.yaml").write_text(text)
    again = command("pipeline", "run", "again.yaml", cwd=workplace, python=warm_python)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing left to do") == 3
    assert report_file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("harvest", "run", "--layer", "9", *FILE), "layer 9"),
        (("train", "run", "--shards", "nowhere"), "nowhere is not a shard set"),
        (("evaluate", "run", "nowhere", "--shards", "data/l1"), "nowhere"),
        (("pipeline", "run", "missing.yaml"), "missing.yaml cannot be read"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    workplace: Path, arguments: tuple[str, ...], message: str, warm_python: WarmPython
) -> None:
    result = command(*arguments, cwd=workplace, python=warm_python)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    # after what was read so far
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == result.stderr.splitlines()[-1:]
    assert not (workplace / "nowhere").exists()
    assert not (workplace / "data/l9").exists()
