"""The identity of a model's weights: equal for equal weights wherever they are, another for any other ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.weights_digest import _spans, config_digest, weights_digest


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed(folder: Path, to: Path, change: dict[str, Tensor]) -> Path:
    return save(to, load_file(folder / "model.safetensors") | change)


def test_the_spelling_of_the_path_does_not_matter(
    tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = weights_digest(str(tiny_llama))
    copy = shutil.copytree(tiny_llama, tmp_path / "a" / "other-name")
    (tmp_path / "link").symlink_to(copy)
    monkeypatch.chdir(tmp_path)
    for name in (copy, "a/other-name", "./a/../link", tmp_path / "link"):
        assert weights_digest(str(name)) == digest
    assert weights_digest(str(tiny_gpt2)) != digest
    for dtype in ("float32", "bfloat16"):
        assert LanguageModel.load(str(copy), dtype=dtype, device="cpu").weights_digest == digest


def test_the_settings_of_a_model_have_a_digest_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    digest = config_digest(str(tiny_llama))
    content = json.loads((tiny_llama / "config.json").read_text())

    def of(changed: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps(changed, indent=1))
        return config_digest(str(tmp_path))

    assert of(dict(reversed(content.items()))) == digest
    assert of(content | {"transformers_version": "0.1", "dtype": "float64", "use_cache": False}) == digest
    assert of({"text_config": content}) == of({"text_config": content | {"_name_or_path": "x"}}) != digest
    assert len({digest, of(content | {"rms_norm_eps": 0.5}), of(content | {"rope_theta": 7.0})}) == 3
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"The config\.json of the model in the folder .* could not be loaded"):
        config_digest(str(tmp_path))
    assert LanguageModel.load(str(tiny_llama), dtype="float32", device="cpu").config_digest == digest


def test_every_change_of_a_tensor_is_another_model(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    # One tensor is read whole, of the other (1.2 MB) some spans.
    tensors = {"norm": torch.randn(24, generator=generator), "embed": torch.randn(5000, 60, generator=generator)}
    original = save(tmp_path / "original", tensors)
    digest = weights_digest(str(original))
    embed, norm = tensors["embed"], tensors["norm"]
    one = norm.clone()
    one[17] += 1e-6
    others: dict[str, dict[str, Tensor]] = {
        "one number of a small tensor": {"norm": one},
        "a large tensor, trained on": {"embed": embed + 1e-4 * torch.randn(embed.shape, generator=generator)},
        "a large tensor, its last row": {"embed": torch.cat([embed[:-1], embed[-1:] * 2])},
        "rows in another order": {"embed": embed.flip(0)},
        "another dtype": {"embed": embed.bfloat16()},
        "another shape": {"embed": embed.reshape(10000, 30)},
        "one more": {"bias": torch.zeros(3)},
    }
    digests = [weights_digest(str(changed(original, tmp_path / name, change))) for name, change in others.items()]
    assert len({digest, *digests}) == 1 + len(others)
    renamed = save(tmp_path / "renamed", {"scale": norm, "embed": embed})
    assert weights_digest(str(renamed)) not in {digest, *digests}


def test_how_tensors_are_spread_over_files_does_not_matter(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "many", max_shard_size=5000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert weights_digest(str(tmp_path / "many")) == weights_digest(str(tiny_llama))


def test_little_of_a_large_tensor_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "large", {"embed": torch.zeros(40_000_000, dtype=torch.uint8)})
    spans = list(_spans(40_000_000))
    assert sum(stop - start for start, stop in spans) == 64 * 4096
    assert (spans[0][0], spans[-1][1]) == (0, 40_000_000)
    assert len(weights_digest(str(folder))) == 64


def test_damaged_files_are_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    content = (tiny_llama / "model.safetensors").read_bytes()
    cases = {"cut": content[:-10], "empty": b"", "noise": os.urandom(300), "long": b"\xff" * 8 + content[8:]}
    for name, damaged in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="The weights of the model in the folder"):
            weights_digest(str(folder))
    with pytest.raises(UserError, match=r"has no file model\.safetensors"):
        weights_digest(str(tmp_path))
