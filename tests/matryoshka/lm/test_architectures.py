"""Architectures in which a site is not where it mostly is."""

from __future__ import annotations

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.sites import SITES, hook_point

TOKENS = torch.randint(4, 94, (3, 29), generator=torch.Generator().manual_seed(0))
TOKENS[:, 0] = 2
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def test_scaled_contributions_are_read_as_they_are_added(save_tiny_model):
    from transformers import GraniteConfig, GraniteForCausalLM

    # Granite multiplies what a sublayer returns, so no module's output is what is added to the residual stream.
    folder = save_tiny_model(GraniteForCausalLM, GraniteConfig(**SMALL, residual_multiplier=0.25))
    model = LanguageModel.load(str(folder), dtype="float32", device="cpu")
    points = [hook_point(site, 1) for site in SITES]
    pre, attn, mid, mlp, post = model.capture(TOKENS, points).values()
    torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(mid + mlp, post)
    clean = model.logits(TOKENS)
    ablated = model.logits(TOKENS, {points[3]: torch.zeros_like})
    assert (ablated - clean).norm() > 0.01 * clean.norm()


def test_parallel_blocks_have_no_resid_mid(save_tiny_model):
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=97, n_embd=24, n_layer=2, n_head=3, rotary_dim=4, n_positions=64, bos_token_id=2, eos_token_id=1
    )
    model = LanguageModel.load(str(save_tiny_model(GPTJForCausalLM, config)), dtype="float32", device="cpu")
    with pytest.raises(UserError, match="attention and its MLP read the same input"):
        model.capture(TOKENS, [hook_point("resid_mid", 1)])
    with pytest.raises(UserError, match="parallel"):
        model.norm_before("resid_mid", 0)
    others = [hook_point(site, 1) for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    pre, attn, mlp, post = model.capture(TOKENS, others).values()
    torch.testing.assert_close(pre + attn + mlp, post)
    assert model.norm_before("resid_pre", 1).kind == "layer"


def test_a_post_norm_is_not_taken_for_a_norm_before(tiny_olmo2):
    model = LanguageModel.load(str(tiny_olmo2), dtype="float32", device="cpu")
    assert model.norm_before("resid_mid", 1) is None
    assert model.norm_before("resid_pre", 1) is None
    pre, attn, mid = model.capture(TOKENS, [hook_point(s, 1) for s in SITES[:3]]).values()
    torch.testing.assert_close(pre + attn, mid)
