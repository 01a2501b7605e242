"""Harvesting a tiny Gemma-2 through the real entry point: complete, again, killed and continued."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import files, refused
from torch import Tensor
from warm_processes import WarmPython

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSet

LAYER, CTX_LEN, BATCH = 1, 16, 7

Harvest = Callable[..., tuple[int, str]]


def command(arguments: list[str], out: Path) -> list[str]:
    return ["-m", "harvest", *arguments, "--out", str(out)]


# A complete harvest


def test_complete_harvest(done: tuple[Path, str], tiny_gemma2: Path) -> None:
    path, said = done
    shards = ShardSet.open(path, verify=True)
    assert (shards.train.n_contexts, shards.val.n_contexts, shards.train.n_shards) == (225, 25, 9)
    assert (shards.d_in, shards.d_out, shards.ctx_len) == (24, 24, CTX_LEN)
    manifest = shards.manifest
    assert manifest.source.hook_point == "blocks.1.hook_resid_mid"
    assert manifest.target.hook_point == "blocks.1.hook_mlp_out"
    assert (manifest.bos_id, manifest.special_ids) == (2, (0, 1, 2, 3))
    assert (manifest.model["model"], manifest.model["weight_dtype"]) == (str(tiny_gemma2), "float32")
    assert shards.norm is not None
    assert shards.norm.kind == "rms"
    assert "(40 .txt)" in said
    assert "4,000 tokens to harvest: about" in said
    assert "10 shards written (4,000 tokens" in said
    assert "bytes per token" in said


def test_set_holds_the_text_it_was_given(done: tuple[Path, str], tiny_text: Path, lm: LanguageModel) -> None:
    shards = ShardSet.open(done[0])
    texts = [file.read_text().split() for file in sorted(tiny_text.glob("*.txt"))]
    words = lm.tokenizer.get_vocab()
    for split in (shards.train, shards.val):
        for shard in range(split.n_shards):
            assert bool((split.tokens(shard)[:, 0] == 2).all())
            keep = split.keep(shard)
            assert bool((~keep[0]).all())
            assert bool(keep[1:].all())
    first = shards.train.tokens(0)[0, 1:].tolist()
    document = [words[word] for word in texts[int(shards.train.doc_ids(0)[0, 0])]]
    assert any(document[i : i + len(first)] == first for i in range(len(document)))


def test_activations_equal_forward_hooks_on_the_hugging_face_model(
    harvest: Harvest, tiny_gemma2: Path, tmp_path: Path
) -> None:
    """What feeds the pre-MLP norm, and what the post-MLP norm gives, rounded from float32 to bfloat16 once."""
    from transformers import AutoModelForCausalLM

    assert harvest()[0] == 0
    shards = ShardSet.open(tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_gemma2, dtype=torch.float32, attn_implementation="eager")
    block, seen = model.model.layers[LAYER], {}
    block.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, args: seen.update(source=args[0]))
    block.post_feedforward_layernorm.register_forward_hook(lambda _, __, output: seen.update(target=output))
    for split, shard in (("train", 0), ("train", 8), ("val", 0)):
        part = shards.split(split)
        tokens = part.tokens(shard).long()
        wanted: dict[str, list[Tensor]] = {"source": [], "target": []}
        for first in range(0, len(tokens), BATCH):
            with torch.no_grad():
                model(tokens[first : first + BATCH])
            for side, values in seen.items():
                wanted[side].append(values.bfloat16())
        for side, values in wanted.items():
            assert torch.equal(part.activations(side, shard), torch.cat(values).transpose(0, 1))


def test_again_there_is_nothing_left_to_do(done: tuple[Path, str], arguments: list[str], tmp_path: Path) -> None:
    """Through the console script, in an interpreter of its own."""
    path, _ = done
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.rglob("*") if p.is_file()}
    words = [Path(sys.executable).with_name("harvest"), *arguments, "--out", path]
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "nothing left to do (4,000 tokens" in again.stderr
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.kill
def test_killed_and_continued_equals_uninterrupted(
    done: tuple[Path, str], arguments: list[str], tmp_path: Path, warm_python: WarmPython
) -> None:
    path = tmp_path / "l1"
    with warm_python.start(command(arguments, path), tmp_path) as process:
        process.until(lambda: list(path.glob("manifest/*.json")))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    n_committed = len(list(path.glob("manifest/*.json")))
    assert 1 <= n_committed < 10
    with pytest.raises(UserError, match="unfinished"):
        ShardSet.open(path)
    continued = warm_python.run(command(arguments, path), tmp_path)
    assert continued.returncode == 0, continued.stderr
    assert f"{10 - n_committed} shards written" in continued.stderr
    assert files(path) == files(done[0])


# The same in this process


def test_stopped_by_a_full_disk_and_continued(
    harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zarr.storage import _local

    put, left = _local._put, 150

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return put(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_local, "_put", full)
        message = refused(harvest())
    assert "No space left on device" in message
    assert "run the same command again: committed shards are kept" in message
    n_committed = len(list((tmp_path / "out" / "manifest").glob("*.json")))
    assert 1 <= n_committed < 10
    with pytest.raises(UserError, match=f"unfinished: it has {n_committed} of 10"):
        ShardSet.open(tmp_path / "out")
    code, said = harvest()
    assert code == 0
    assert f"{10 - n_committed} shards written" in said
    ShardSet.open(tmp_path / "out", verify=True)


def test_batch_size_and_place_are_free_to_change(harvest: Harvest, tmp_path: Path) -> None:
    assert harvest()[0] == 0
    assert "nothing left to do" in harvest("--batch-size", "5")[1]
    shutil.move(tmp_path / "out", tmp_path / "moved[1]")
    code, said = harvest(out=tmp_path / "moved[1]")
    assert code == 0
    assert "moved[1]: nothing left to do" in said


def test_text_that_ends_early_is_said(harvest: Harvest, tmp_path: Path) -> None:
    code, said = harvest("--tokens", "40k")
    assert code == 0
    shards = ShardSet.open(tmp_path / "out", verify=True)
    n_tokens = (shards.train.n_contexts + shards.val.n_contexts) * CTX_LEN
    assert 25_000 < n_tokens < 40_000
    assert f"the text ended early: {n_tokens:,} of 40,000 tokens" in said
    # and long before the end: val, which comes first, has read the whole text
    assert f"the text is shorter than --tokens: val has {shards.val.n_contexts} of the 250 contexts" in said
    assert said.count("is shorter") == 1
    before = files(tmp_path / "out")
    assert "nothing left to do" in harvest("--tokens", "40k")[1]
    assert files(tmp_path / "out") == before
    # a shard of the cut set can be made again
    (tmp_path / "out" / "manifest" / "train-00000.json").unlink()
    assert harvest("--tokens", "40k")[0] == 0
    assert files(tmp_path / "out") == before


def test_changed_text_is_not_mixed_in(harvest: Harvest, tiny_text: Path, tmp_path: Path) -> None:
    text = Path(shutil.copytree(tiny_text, tmp_path / "text"))
    assert harvest("--dataset", str(text))[0] == 0
    (tmp_path / "out" / "manifest" / "val-00000.json").unlink()
    for file in text.glob("*.txt"):  # other words, the same sizes
        file.write_text(file.read_text().replace("w1", "w2"))
    message = refused(harvest("--dataset", str(text)))
    assert "is not what it was when shard" in message
    assert not (tmp_path / "out" / "manifest" / "val-00000.json").exists()


# Refusals that need no model


def test_no_document_of_val_is_in_train(done: tuple[Path, str]) -> None:
    shards = ShardSet.open(done[0])
    assert shards.val_unit == "document"
    train, val = (
        {int(i) for shard in range(split.n_shards) for i in split.doc_ids(shard).unique()}
        for split in (shards.train, shards.val)
    )
    assert len(val) > 1
    assert not train & val


def test_a_set_of_before_val_units_holds_out_blocks(harvest: Harvest, tmp_path: Path) -> None:
    """Its settings name no val_unit, as those of --val-unit block still do not."""
    assert harvest("--val-unit", "block")[0] == 0
    shards = ShardSet.open(tmp_path / "out")
    assert "val_unit" not in shards.manifest.settings
    assert shards.val_unit == "block"
    message = refused(harvest("--tokens", "5k"))
    assert "holds out blocks of documents" in message
    assert "--val-unit block" in message
    assert harvest("--tokens", "5k", "--val-unit", "block")[0] == 0
    train, val = (
        {int(i) for shard in range(split.n_shards) for i in split.doc_ids(shard).unique()}
        for split in (ShardSet.open(tmp_path / "out").train, ShardSet.open(tmp_path / "out").val)
    )
    assert train & val


def test_manifest_is_plain_json(done: tuple[Path, str]) -> None:
    attributes = json.loads((done[0] / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is True
    assert attributes["settings"]["tokens"] == 4000
    assert attributes["versions"]["git_commit"] is None or attributes["versions"]["versions"]["torch"]
