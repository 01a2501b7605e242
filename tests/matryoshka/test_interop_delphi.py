"""delphi's cache against plain loops over the stored contexts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from matryoshka.errors import UserError
from matryoshka.interop.export import export
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

Make = Callable[..., Transcoder]


@pytest.fixture
def make(make_transcoder: Make, shards: ShardSet) -> Make:
    facts = shards.manifest
    hooks = {"source_hook": facts.source.hook_point, "target_hook": facts.target.hook_point}
    return partial(make_transcoder, d_in=shards.d_in, d_out=shards.d_out, group_sizes=(5, 18), **hooks)


@pytest.fixture
def shards(toy_path: Path) -> ShardSet:
    return ShardSet.open(toy_path)


def slow(transcoder: Transcoder, toy: Any, shards: ShardSet) -> dict[tuple[int, int, int], float]:
    """(context, position, latent) -> activation, over the val pieces, special positions left out."""
    found = {}
    context = 0
    for (split, _), (tokens, _, source, _) in toy.pieces.items():
        if split != "val":
            continue
        for c in range(tokens.shape[0]):
            for p in range(tokens.shape[1]):
                if int(tokens[c, p]) in toy.manifest.special_ids:
                    continue
                assert shards.norm is not None
                acts = transcoder.encode(shards.norm.normalized(source[p, c][None]))[0]
                for latent, value in enumerate(acts.tolist()):
                    if value > 1e-5:
                        found[context, p, latent] = value
            context += 1
    return found


def test_every_activation_is_there_once(make: Make, toy: Any, shards: ShardSet, tmp_path: Path) -> None:
    transcoder = make()
    exported = export([transcoder], "delphi", tmp_path / "out", shards=shards)
    assert exported.weights == tmp_path / "out" / shards.manifest.target.hook_point
    files = sorted(path.name for path in exported.weights.glob("*.safetensors"))
    assert files == ["0_3.safetensors", "13_17.safetensors", "18_22.safetensors", "4_8.safetensors", "9_12.safetensors"]
    expected_tokens = torch.cat([tokens for (split, _), (tokens, *_) in toy.pieces.items() if split == "val"])
    found = {}
    for name in files:
        start, end = (int(part) for part in name.removesuffix(".safetensors").split("_"))
        data = load_file(exported.weights / name)
        assert data["locations"].dtype == np.uint16
        assert data["activations"].dtype == np.float16
        assert data["tokens"].dtype == np.int64
        assert np.array_equal(data["tokens"], expected_tokens.numpy())
        for (context, position, latent), value in zip(data["locations"].tolist(), data["activations"], strict=True):
            assert start <= start + latent <= end
            found[context, position, start + latent] = float(value)
    expected = slow(transcoder, toy, shards)
    assert found.keys() == expected.keys()
    assert len(found) > 50
    assert all(abs(found[key] - value) <= 1e-3 * value + 1e-6 for key, value in expected.items())
    config = json.loads((exported.weights / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"], config["model_name"]) == (6, 5, "google/gemma-2-2b")
    assert config["n_tokens"] == expected_tokens.numel()


def test_the_cache_is_bound_to_its_shard_set(make: Make, shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --shards"):
        export([make()], "delphi", tmp_path / "out")
    other = make(source_hook="blocks.9.hook_resid_mid", target_hook="blocks.9.hook_mlp_out")
    with pytest.raises(UserError, match=r"reads blocks\.9\.hook_resid_mid .* pass the shard set it was trained on"):
        export([other], "delphi", tmp_path / "out", shards=shards)
    assert list(tmp_path.iterdir()) == []
    export([make()], "delphi", tmp_path / "out", shards=shards)
    assert export([make()], "delphi", tmp_path / "out", shards=shards).already_there
