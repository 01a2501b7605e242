"""What a loaded model says of itself, and what it holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch


def test_facts_of_the_model(load, tiny_gemma2):
    from transformers import AutoModelForCausalLM

    model = load("tiny_gemma2", "bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tiny_gemma2)
    n_params = sum(p.numel() for p in plain.parameters())
    assert (model.name, model.revision, model.dtype) == (str(tiny_gemma2), None, torch.bfloat16)
    assert (model.d_model, model.n_layers, model.n_ctx, model.device.type) == (24, 3, 64, "cpu")
    assert (model.bos_id, model.special_ids) == (2, (0, 1, 2, 3))
    assert (model.n_params, model.weight_bytes) == (n_params, 2 * n_params)
    facts = json.loads(json.dumps(model.describe()))
    assert facts["architecture"] == "Gemma2ForCausalLM"
    assert facts["weight_dtype"] == "bfloat16"
    assert facts["attention"] == "eager"  # sdpa has no soft cap
    assert facts["tokenizer"]["vocab_size"] == 97
    assert load("tiny_llama").describe()["attention"] == "sdpa"


def test_the_weights_are_held_once(load):
    model = load("tiny_gemma2")
    parameters = list(model._model.parameters())
    assert sum(p.numel() * p.element_size() for p in parameters) == model.weight_bytes
    assert not hasattr(model._points.blocks[0], "hook_in")  # no part of it was wrapped


def test_the_tokenizer_stays_as_it_was_loaded(load):
    model = load("tiny_gpt2")
    assert (model.bos_id, model.special_ids, model.tokenizer.pad_token) == (0, (0,), None)
    assert model.tokenizer("w0 w3")["input_ids"] == [1, 4]
    assert load("tiny_gemma2").tokenizer("w0 w3")["input_ids"] == [4, 7]


@pytest.mark.process
def test_import_is_cheap():
    code = (
        "import sys, matryoshka.lm; "
        "sys.exit(str([m for m in ('transformers', 'transformer_lens', 'datasets') if m in sys.modules] or ''))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
