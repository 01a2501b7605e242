"""The model of a shard set, loaded again: it has the weights of the harvest, whatever its folder is called."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from evaluate.language_model.load import load_model
from matryoshka.errors import UserError


def rewrite(folder: Path, **changes: Any) -> None:
    """Change config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_weights_are_those_of_the_harvest(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    facts = one.shards.manifest.model | {"weights_digest": one.model.weights_digest}
    shards = copy.copy(one.shards)
    shards.manifest = one.shards.manifest.model_copy(update={"model": facts})
    moved = Path(shutil.copytree(one.folder, tmp_path / "elsewhere"))
    assert load_model(shards, one.config(lm={"model": str(moved)})).name == str(moved)
    # a layer behind the one that was harvested: the stored activations are the same
    weights = load_file(moved / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] * 1.5}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="elsewhere has other weights than the model with which .* was harvested"):
        load_model(shards, one.config(lm={"model": str(moved)}))
    eps = json.loads((moved / "config.json").read_text())["rms_norm_eps"]
    rewrite(moved, rms_norm_eps=1.0)
    shards.manifest.model["config_digest"] = one.model.config_digest
    del shards.manifest.model["weights_digest"]
    with pytest.raises(UserError, match=r"elsewhere has other settings \(config.json\) than the model with which"):
        load_model(shards, one.config(lm={"model": str(moved)}))
    rewrite(moved, rms_norm_eps=eps)
    assert load_model(one.shards, one.config(lm={"model": str(moved)})).name == str(moved)  # an earlier set knows none
