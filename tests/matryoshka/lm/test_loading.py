"""Models that cannot be loaded, and what the user is told."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel

pytestmark = pytest.mark.usefixtures("no_process")


def broken(folder, tmp_path, remove=(), config=None):
    copy = shutil.copytree(folder, tmp_path / "broken")
    for pattern in remove:
        for path in copy.glob(pattern):
            path.unlink()
    if config:
        facts = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(facts | config))
    return copy


def test_a_folder_without_a_part_says_which(tiny_llama, tmp_path):
    for number, (pattern, part) in enumerate(
        (("tokenizer*", "tokenizer"), ("*.safetensors", "weights"), ("config.json", "configuration"))
    ):
        folder = broken(tiny_llama, tmp_path / str(number), [pattern])
        with pytest.raises(UserError, match=f"The {part} of the model in the folder .* could not be loaded"):
            LanguageModel.load(str(folder), dtype="float32")


def test_missing_weights_are_never_random(tiny_llama, tmp_path):
    folder = broken(tiny_llama, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 tensors are missing .*layers.1.mlp.up_proj.weight"):
        LanguageModel.load(str(folder), dtype="float32")


def test_weights_of_another_shape_are_refused(tiny_llama, tmp_path):
    folder = broken(tiny_llama, tmp_path, config={"intermediate_size": 50})
    with pytest.raises(UserError, match="The weight"):
        LanguageModel.load(str(folder), dtype="float32")


def test_the_models_own_code_is_never_run(tiny_llama, tmp_path):
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    folder = broken(tiny_llama, tmp_path, config=own)
    (folder / "own.py").write_text("raise SystemExit('the code of the model ran')")
    with pytest.raises(UserError, match="configuration"):
        LanguageModel.load(str(folder), dtype="float32")


def test_an_architecture_that_transformer_lens_does_not_know_is_refused(save_tiny_model):
    from transformers import CTRLConfig, CTRLLMHeadModel

    config = CTRLConfig(vocab_size=97, n_embd=24, n_layer=2, n_head=3, dff=40, n_positions=64)
    with pytest.raises(UserError, match="TransformerLens does not know .* a CTRLLMHeadModel"):
        LanguageModel.load(str(save_tiny_model(CTRLLMHeadModel, config)), dtype="float32")


def test_an_unreachable_model_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        LanguageModel.load("google/gemma-2-2b-of-nobody", revision="abc", dtype="float32")
    message = str(caught.value)
    for part in ("google/gemma-2-2b-of-nobody", "revision abc", "HF_TOKEN", "licence", "folder", "HF_HUB_OFFLINE"):
        assert part in message


def test_a_gated_model_says_what_to_do(monkeypatch):
    import transformers

    def refuse(*_args, **_kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match="gated repo. Make sure .* accept its licence .* HF_TOKEN"):
        LanguageModel.load("google/gemma-2-2b", dtype="float32")


def test_the_commit_is_resolved_once_for_all_parts(tiny_llama, monkeypatch):
    import transformers

    asked = {}
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        original = getattr(transformers, name).from_pretrained

        def from_pretrained(path, *, original=original, name=name, **options):
            asked.setdefault(name, options.get("revision"))
            loaded = original(path, **options)
            if name == "AutoConfig":
                loaded._commit_hash = "c0ffee"
            return loaded

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)
    model = LanguageModel.load(str(tiny_llama), revision="main", dtype="float32")
    assert asked == {"AutoConfig": "main", "AutoTokenizer": "c0ffee", "AutoModelForCausalLM": "c0ffee"}
    assert model.revision == model.describe()["revision"] == "c0ffee"
