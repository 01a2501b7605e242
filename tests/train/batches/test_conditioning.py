"""Conditioning and folding: what is saved computes the same as what was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig
from train.batches.conditioning import Conditioning

CPU = torch.device("cpu")


def train_rows(shards: ShardSet) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [block.rows() for block in shards.train.blocks()]
    return torch.cat([s for s, _ in pairs]), torch.cat([t for _, t in pairs])


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("condition", ["none", "centre", "standardise"])
def test_moments_of_the_conditioned_rows(random_shards: ShardSet, convention: str, condition: str) -> None:
    conditioning = Conditioning.from_shards(random_shards, convention, condition, CPU)
    source, target = train_rows(random_shards)
    x = conditioning.input(source).double().numpy()
    y = conditioning.target(target).double().numpy()
    assert np.square(x).mean() == pytest.approx(1, abs=2e-3)
    if condition != "none":
        assert np.abs(x.mean(0)).max() < 2e-3
    if condition == "standardise":
        assert np.abs(x.var(0) - 1).max() < 5e-3
    assert y.var(0).mean() == pytest.approx(1, abs=1e-4)
    assert conditioning.target_variance == pytest.approx(y.var(0).sum(), rel=1e-4)


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("condition", ["none", "centre", "standardise"])
@pytest.mark.parametrize("skip", [False, True])
def test_folded_equals_unfolded(random_shards: ShardSet, convention: str, condition: str, skip: bool) -> None:
    conditioning = Conditioning.from_shards(random_shards, convention, condition, CPU)
    g = torch.Generator().manual_seed(1)
    d_in, d_out, d_sae = 12, 10, 24
    weights = {
        "W_enc": torch.randn(d_sae, d_in, generator=g) / d_in**0.5,
        "b_enc": torch.randn(d_sae, generator=g) * 0.1,
        "W_dec": torch.nn.functional.normalize(torch.randn(d_sae, d_out, generator=g), dim=1),
        "b_dec": torch.randn(d_out, generator=g),
    }
    if skip:
        weights["W_skip"] = torch.randn(d_in, d_out, generator=g)
    threshold = torch.tensor(0.4)
    source, _ = train_rows(random_shards)
    x_hat = conditioning.input(source)
    pre_acts = x_hat @ weights["W_enc"].T + weights["b_enc"]
    acts = torch.where(pre_acts > threshold, pre_acts, 0.0).relu()
    expected = (
        acts @ weights["W_dec"] + weights["b_dec"] + (x_hat @ weights["W_skip"] if skip else 0)
    ) * conditioning.s_y

    config = TranscoderConfig(d_in=d_in, d_out=d_out, group_sizes=(4, 8, 12), k=3, skip=skip, input=convention)
    transcoder = Transcoder(config)
    transcoder.set_weights(conditioning.fold(weights, threshold))
    x = apply_convention(source, convention, source_site="resid_mid", norm=random_shards.norm)
    torch.testing.assert_close(transcoder(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(transcoder.encode(x) > 0, acts > 0) or ((transcoder.encode(x) > 0) != (acts > 0)).sum() <= 2
    torch.testing.assert_close(transcoder.W_dec.norm(dim=1), torch.ones(d_sae))


def test_a_convention_the_set_cannot_give_is_refused(random_shards: ShardSet) -> None:
    with pytest.raises(UserError, match="attn_in.*choose resid_mid, normalized, mlp_in"):
        Conditioning.from_shards(random_shards, "attn_in", "centre", CPU)
