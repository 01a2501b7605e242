"""A set grows, continues and is repaired with the weights it was begun with, whatever their folder is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSet
from matryoshka.shards.records import read_manifest

LOAD = LanguageModel.__dict__["load"]  # the fixture `cli` gives another model
Cli = Callable[..., tuple[int, str, str]]
TENSOR = "model.layers.2.mlp.down_proj.weight"


class Lab:
    """A copy of a model, and a set of it at `out`."""

    def __init__(self, folder: Path, cli: Cli, arguments: list[str], model: Path) -> None:
        self.model, self.out = shutil.copytree(model, folder / "lab" / "gemma"), folder / "out"
        self._cli, self._arguments = cli, arguments

    def harvest(self, model: Path | str, *extra: str) -> tuple[int, str]:
        code, _, err = self._cli(*self._arguments, "--model", str(model), "--out", str(self.out), *extra)
        return code, err

    def change(self) -> None:
        """Other weights at the same path, in one tensor."""
        weights = load_file(self.model / "model.safetensors")
        save_file(weights | {TENSOR: weights[TENSOR] * 1.5}, self.model / "model.safetensors", {"format": "pt"})

    def configure(self, **changes: Any) -> None:
        """Other values in config.json."""
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(self.out.rglob("*")) if path.is_file()}


@pytest.fixture
def lab(tmp_path: Path, cli: Cli, arguments: list[str], tiny_gemma2: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(LanguageModel, "load", LOAD)
    made = Lab(tmp_path, cli, arguments, tiny_gemma2)
    code, err = made.harvest(made.model)
    assert code == 0, err
    return made


def test_the_manifest_says_which_weights(lab: Lab, tiny_gemma2: Path) -> None:
    digest = read_manifest(lab.out).model["weights_digest"]
    assert digest == LanguageModel.load(str(tiny_gemma2), dtype="float32", device="cpu").weights_digest


def test_other_weights_at_the_same_path_are_refused(lab: Lab) -> None:
    lab.change()
    before = lab.files()
    code, err = lab.harvest(lab.model, "--tokens", "8k")
    assert code == 2
    assert "was harvested with other weights than those of" in err
    assert lab.files() == before


def test_other_settings_of_the_model_are_refused(lab: Lab) -> None:
    lab.configure(transformers_version="4.0.0", use_cache=False)  # as saving it again with another version may
    code, err = lab.harvest(lab.model, "--tokens", "8k")
    assert code == 0, err
    lab.configure(rms_norm_eps=1e-3)
    before = lab.files()
    for tokens in ("8k", "12k"):  # the finished set, and a larger one
        code, err = lab.harvest(lab.model, "--tokens", tokens)
        assert code == 2
        assert "was harvested with other settings (config.json) than those of" in err
    assert lab.files() == before


def test_a_finished_set_is_of_the_model_that_is_there_now(lab: Lab) -> None:
    lab.change()
    code, err = lab.harvest(lab.model)
    assert code == 2
    assert "was harvested with other weights than those of" in err
    shutil.rmtree(lab.model)  # nothing to compare, and nothing is fetched
    code, err = lab.harvest(lab.model)
    assert code == 0, err
    assert "nothing left to do" in err


def test_a_repair_with_other_weights_throws_nothing_away(lab: Lab, cli: Cli) -> None:
    lab.change()
    shard = next(
        path
        for path in sorted((lab.out / "train" / "source").rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    )
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    before = lab.files()
    code, _, err = cli("verify", str(lab.out), "--repair", "--device", "cpu")
    assert code == 2
    assert "was harvested with other weights than those of" in err
    assert lab.files() == before


def test_the_same_weights_by_another_path_are_the_same_model(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = shutil.move(lab.model, lab.model.parent / "renamed")
    monkeypatch.chdir(lab.model.parent)
    for name, tokens in (("../lab/renamed", "8k"), (moved, "12k")):
        code, err = lab.harvest(name, "--tokens", tokens)
        assert code == 0, err
    shards = ShardSet.open(lab.out)
    assert shards.manifest.model["model"] == str(lab.model)  # as it was begun
    assert shards.manifest.settings["tokens"] == 12_000


def test_two_models_of_one_name_are_two(lab: Lab, tmp_path: Path) -> None:
    other = shutil.copytree(lab.model, tmp_path / "B" / "gemma")
    lab.change()
    assert other.name == lab.model.name
    code, err = lab.harvest(other)  # it has the weights that the set was begun with
    assert code == 0, err
    shutil.copytree(lab.model, other, dirs_exist_ok=True)
    code, err = lab.harvest(other)
    assert code == 2
    assert "was harvested with other settings (model: " in err


def test_a_set_of_an_earlier_version_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no digest: the name decides, as then."""
    root = lab.out / "zarr.json"
    content: dict[str, Any] = json.loads(root.read_text())
    del content["attributes"]["model"]["config_digest"]  # before it was compared
    root.write_text(json.dumps(content))
    assert lab.harvest(lab.model, "--tokens", "6k")[0] == 0
    content = json.loads(root.read_text())
    assert "config_digest" not in content["attributes"]["model"]
    del content["attributes"]["model"]["weights_digest"]
    root.write_text(json.dumps(content))
    code, err = lab.harvest(lab.model, "--tokens", "8k")
    assert code == 0, err
    assert "weights_digest" not in read_manifest(lab.out).model
    monkeypatch.chdir(lab.model.parent)
    code, err = lab.harvest("./gemma", "--tokens", "12k")
    assert code == 2
    assert "was harvested with other settings (model: " in err
