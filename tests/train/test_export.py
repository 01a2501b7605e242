"""`train export`: which weights are meant, what the run and its shard set add, and the command as a person types it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig
from train.export import export_runs


def make(seed: int = 0, *, layer: int = 3, d_out: int = 10) -> Transcoder:
    transcoder = Transcoder(
        TranscoderConfig(
            d_in=12,
            d_out=d_out,
            group_sizes=(5, 11, 32),
            k=4,
            input="normalized",
            source_hook=f"blocks.{layer}.hook_resid_mid",
            target_hook=f"blocks.{layer}.hook_mlp_out",
            model="google/gemma-2-2b",
        )
    )
    generator = torch.Generator().manual_seed(seed)
    transcoder.set_weights(
        {name: torch.randn(p.shape, generator=generator) for name, p in transcoder.named_parameters()}
    )
    return transcoder


def write_run(folder: Path, transcoder: Transcoder, shards: Path | str = "gone") -> Path:
    for step, weights in ((100, make(seed=99)), (400, transcoder)):
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        weights.save(checkpoint)
        publish_json(checkpoint / "state.json", {"format_version": 1, "step": step, "finished": step == 400})
    publish_json(folder / "run.json", {"format_version": 1, "config": {"shards": str(shards)}})
    return folder


def cfg(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cfg.json").read_text())


def test_the_newest_checkpoint_and_the_facts_of_the_shard_set(tmp_path: Path, random_shards: ShardSet) -> None:
    run = write_run(tmp_path / "l3-k4", make(), random_shards.path)
    export_runs([run], "saelens", out=tmp_path / "out")
    metadata = cfg(tmp_path / "out")["metadata"]
    assert (metadata["context_size"], metadata["dataset_path"], metadata["prepend_bos"]) == (16, "none", True)
    assert torch.equal(Transcoder.from_pretrained(tmp_path / "out").W_enc, make().W_enc)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| run | l3-k4, step 400 |" in text
    assert str(tmp_path) not in text


def test_the_card_says_what_the_training_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "l3-k4", make())
    session = {"first_step": 0, "device": "cpu", "precision": "bf16", "backend": "sparse", "n_ranks": 1}
    data = {"dataset": "me/books", "val_unit": "document", "documents": {"train": 70, "val": 4}}
    config = {"shards": "gone", "batch_tokens": 128}
    publish_json(run / "run.json", {"format_version": 1, "config": config, "sessions": [session], "data": data})
    export_runs([run], "saelens", out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    facts = {
        "text": "me/books",
        "tokens seen": "51,200",
        "documents": "train 70, val 4",
        "held out": "whole documents, which train never saw",
    }
    for what, value in {**facts, "precision of the encoder product": "bf16"}.items():
        assert f"| {what} | {value} |" in text
    assert "not recorded" not in text


def test_a_checkpoint_can_be_named_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "l3-k4", make())
    older = run / "checkpoints" / "step-000100"
    export_runs([older], "saelens", out=tmp_path / "out")
    assert torch.equal(Transcoder.from_pretrained(tmp_path / "out").W_enc, make(seed=99).W_enc)
    assert "| run | l3-k4, step 100 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_every_prefix(tmp_path: Path, prefix: int) -> None:
    run = write_run(tmp_path / "l3-k4", make())
    export_runs([run], "saelens", prefix=prefix, out=tmp_path / "out")
    end = (5, 16, 48)[prefix - 1]
    assert cfg(tmp_path / "out")["d_sae"] == end
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Transcoder.from_pretrained(tmp_path / "out")(x), make()(x, prefix), atol=0, rtol=0)


def test_a_set_of_several_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"l{i}", make(seed=i, layer=i, d_out=12)) for i in (1, 2)]
    with pytest.raises(UserError, match="pass --n-layers"):
        export_runs(runs, "circuit-tracer", out=tmp_path / "out")
    export_runs(runs, "circuit-tracer", out=tmp_path / "out", n_layers=4, prefix=2)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["trained_layers"] == [1, 2]
    again = Transcoder.from_pretrained(tmp_path / "out", layer=2)
    assert torch.equal(again.W_dec, make(seed=2, layer=2, d_out=12).W_dec[:16])


@pytest.mark.parametrize(
    ("prefix", "message"),
    [(0, "no prefix 0"), (4, r"no prefix 4: .* groups, 1 \(5 latents\), 2 \(16 latents\), 3 \(48")],
)
def test_prefixes_that_are_not_there(tmp_path: Path, prefix: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_runs([write_run(tmp_path / "r", make())], "saelens", prefix=prefix, out=tmp_path / "out")


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        export_runs([tmp_path], "saelens")
    publish_json(tmp_path / "run.json", {"format_version": 1})
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export_runs([tmp_path], "saelens")
    with pytest.raises(UserError, match="no run was named"):
        export_runs([], "saelens")


def test_the_command(tmp_path: Path, typed: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    write_run(tmp_path / "runs" / "l3-k4", make())
    export = ("train", "export", "runs/l3-k4", "--format")
    done = typed(*export, "gemma-scope", "--prefix", "2")
    assert (done.returncode, done.stderr) == (0, "")
    first, *dropped = done.stdout.splitlines()
    assert first == "data/exports/l3-k4-gemma-scope-prefix2 written"
    assert "not in it: k = 4" in dropped
    assert (tmp_path / "data/exports/l3-k4-gemma-scope-prefix2/layer_3/width_16/canonical/params.npz").is_file()
    again = typed(*export, "gemma-scope", "--prefix", "2")
    assert again.stdout.splitlines() == ["data/exports/l3-k4-gemma-scope-prefix2 is there already", *dropped]
    wrong = typed(*export, "onnx")
    assert wrong.returncode == 2
    assert "error: there is no format 'onnx'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
