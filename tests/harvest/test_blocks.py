"""Models whose blocks are built in other ways: what is harvested of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSet

LOAD = LanguageModel.__dict__["load"]  # the fixture `cli` gives another model
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
Harvest = Callable[..., tuple[int, str]]


def test_what_mlp_out_is_where_a_block_adds_more(
    save_tiny_model: Callable[[Any, Any], Path],
    harvest: Harvest,
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **SMALL,
        intermediate_size=40,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=97,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    monkeypatch.setattr(LanguageModel, "load", LOAD)
    code, err = harvest("--model", str(save_tiny_model(Gemma4ForCausalLM, config)))
    assert code == 0, err
    notes = ShardSet.open(tmp_path / "out").manifest.model["adds_more"]
    assert list(notes) == ["1"]
    assert "mlp_out is what the MLP adds; the block then adds more (per_layer_input_gate reads" in notes["1"]
    code, out, _ = cli("info", str(tmp_path / "out"))
    assert code == 0
    assert "per_layer_input_gate reads resid_mid + mlp_out" in " ".join(out.split())


def test_blocks_with_norms_in_the_stream_are_refused(
    save_tiny_model: Callable[[Any, Any], Path], harvest: Harvest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """facebook/opt-350m's form: what is called resid_mid already holds what the MLP adds."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False)
    folder = save_tiny_model(OPTForCausalLM, config)
    monkeypatch.setattr(LanguageModel, "load", LOAD)
    code, err = harvest("--model", str(folder))
    assert code == 2
    assert "Traceback" not in err
    assert "resid_mid of layer 1 cannot be read from" in err
    assert "resid_mid is not resid_pre + attn_out but differs by" in err
    assert not (tmp_path / "out").exists()
    code, err = harvest("--model", str(folder), "--source", "resid_pre", "--target", "resid_post")
    assert code == 0, err
