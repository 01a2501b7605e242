"""Harvests that are refused: before the model is loaded, before it runs, and with nothing made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import files, refused

from harvest.packing import Packing, assign_split, document_hash
from matryoshka.lm import LanguageModel
from matryoshka.runs import exclusive

CTX_LEN = 16

Harvest = Callable[..., tuple[int, str]]


def test_other_settings_are_refused_with_the_difference(no_model: Harvest, done: tuple[Path, str]) -> None:
    before = files(done[0])
    message = refused(no_model("--seed", "1", "--codec", "raw", out=done[0]))
    assert 'was harvested with other settings (codec: "compact" -> "raw"; seed: 0 -> 1)' in message
    assert files(done[0]) == before


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (("--tokens", "abc"), "tokens: expected a number such as 15M, 200k or 15000000, got 'abc'"),
        (("--set", "harvest.target=mlp_middle"), "no site"),
        (("--set", "harvest.colour=red"), "colour: unknown key; known keys: model, "),
        (("--dataset", "./nowhere"), "the dataset ./nowhere does not exist"),
        (("--out", "file/below"), "the folder file/below cannot be made"),
        (("--out", "photos"), "photos is not empty and not a shard set"),
    ],
)
def test_refused_before_the_model_is_loaded(
    extra: tuple[str, ...], what: str, no_model: Harvest, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "cat.png").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert what in refused(no_model(*extra))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unfinished_set_of_other_settings_is_refused(harvest: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "matryoshka.shards.storage_local.checksum", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error"))
        )
        assert "I/O error" in refused(harvest())
    assert "seed: 0 -> 3" in refused(harvest("--seed", "3"))
    assert harvest()[0] == 0


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (("--layer", "3"), "layer 3 does not exist: "),
        (("--layer", "3"), "has 3 layers, 0 to 2; choose another --layer"),
        (("--ctx-len", "65"), "ctx_len = 65 is more than the 64 positions of"),
        (("--dataset", "short.txt"), "the text of short.txt has too little for the val split: 0 of its 1 documents"),
        (("--dataset", "empty.txt"), "the text of empty.txt has too little for the val split: 0 of its 0 documents"),
        (("--dataset", "bad.jsonl"), "bad.jsonl, line 1 is not JSON"),
    ],
)
def test_refused_with_nothing_made(extra: tuple[str, ...], what: str, harvest: Harvest, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text("{")
    assert what in refused(harvest(*extra))
    assert not (tmp_path / "out").exists()


def test_no_room_is_refused_before_anything_is_made(
    harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
    message = refused(harvest())
    assert "out has 67 MB free, but this harvest needs about" in message
    assert "fewer --tokens" in message
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_the_rest_only(harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that fills most of the disk must be able to get its last shard."""
    assert harvest()[0] == 0
    (tmp_path / "out" / "manifest" / "train-00003.json").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20 + 100_000))
    code, said = harvest()
    assert code == 0, said
    assert "1 shards written" in said


def test_no_document_for_a_split_is_refused_before_the_model_is_loaded(no_model: Harvest, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(" ".join(f"w{i % 90}" for i in range(40)))
    message = refused(no_model("--dataset", "one.txt"))
    assert "too little for the val split: 0 of its 1 documents belong to val (val_fraction 0.1)" in message
    assert "--val-unit block" in message
    held_out = [f"w1 w2 w{i}" for i in range(3, 90) if _is_val(f"w1 w2 w{i}")]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    n = len(held_out)
    assert f"train split: 0 of its {n} documents belong to train" in refused(no_model("--dataset", "val.jsonl"))
    (tmp_path / "empty.txt").write_text(" ")
    assert "its 0 documents leave nothing" in refused(no_model("--dataset", "empty.txt", "--val-unit", "block"))
    assert not (tmp_path / "out").exists()


def test_too_little_text_for_val_is_refused_before_the_first_forward(
    harvest: Harvest, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that follows from the text alone is known before the model has run, and nothing is written."""
    monkeypatch.setattr(lm, "capture", lambda *_: pytest.fail("the model ran"))
    # one document of each split, but that of val has not a whole context
    short = next(f"w1 w2 w{i}" for i in range(3, 90) if _is_val(f"w1 w2 w{i}"))
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (short, "w1 " * 400)))
    message = refused(harvest("--dataset", "two.jsonl"))
    assert "1 of its 2 documents belong to val (val_fraction 0.1): less than one context of 16 tokens" in message
    # nothing but special tokens
    monkeypatch.setattr(lm, "special_ids", tuple(range(97)))
    assert "all of them special tokens" in refused(harvest())
    assert not (tmp_path / "out").exists()


def _is_val(text: str) -> bool:
    packing = Packing(ctx_len=CTX_LEN, bos_id=2, val_fraction=0.1, seed=0)
    return assign_split(document_hash(text), 0, packing) == "val"


def test_a_set_in_use_is_left_alone(harvest: Harvest, tmp_path: Path) -> None:
    (tmp_path / "out" / "manifest").mkdir(parents=True)
    with exclusive(tmp_path / "out" / "manifest"):
        assert "is being written by another process" in refused(harvest())
    assert harvest()[0] == 0


def test_too_little_memory_for_one_context_says_so(
    harvest: Harvest, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lm, "capture", capture)
    assert "does not hold a forward pass of a single context of 16 tokens" in refused(harvest())


def test_a_model_of_nan_is_refused(
    tiny_gemma2: Path, tmp_path: Path, harvest: Harvest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(tiny_gemma2, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][5, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    message = refused(harvest("--model", str(broken)))
    assert "1 weights of" in message
    assert "in float32 (model.layers.1.mlp.down_proj.weight)" in message
    assert "--dtype" not in message
    assert not (tmp_path / "out").exists()


def test_unreachable_model(arguments: list[str], tmp_path: Path) -> None:
    """In a process of its own, because the hub's client reads the variable once."""
    words = [
        sys.executable,
        *("-m", "harvest", *arguments, "--model", "nobody/no-such-model", "--out", str(tmp_path / "out")),
    ]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(words, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
    message = refused((result.returncode, result.stderr))
    for part in ("nobody/no-such-model", "HF_TOKEN", "local folder"):
        assert part in message
    assert result.stderr.count("\n") <= 2
    assert not (tmp_path / "out").exists()
