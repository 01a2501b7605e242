"""What a transcoder takes: rows in any number of dimensions, finite weights; and how it shows itself."""

from __future__ import annotations

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.transcoder import Transcoder, TranscoderConfig


def make(*, skip: bool, k: int | None = 3) -> Transcoder:
    config = TranscoderConfig(
        d_in=12, d_out=10, group_sizes=(4, 8, 16), k=k, skip=skip, source_hook="blocks.3.hook_resid_mid", model="m"
    )
    transcoder = Transcoder(config)
    g = torch.Generator().manual_seed(0)
    transcoder.set_weights({name: torch.rand(p.shape, generator=g) - 0.4 for name, p in transcoder.named_parameters()})
    return transcoder


@pytest.mark.parametrize("skip", [False, True])
def test_batches_of_sequences_are_their_rows(skip: bool) -> None:
    transcoder = make(skip=skip)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    rows = x.flatten(0, 1)
    acts = transcoder.encode(x)
    assert acts.shape == (2, 5, 28)
    assert torch.equal(acts.flatten(0, 1), transcoder.encode(rows))
    for n_groups in (1, 2, 3):
        y = transcoder(x, n_groups=n_groups)
        assert y.shape == (2, 5, 10)
        assert torch.equal(y.flatten(0, 1), transcoder(rows, n_groups=n_groups))
    for a, b in zip(transcoder.nested(acts, x=x), transcoder.nested(acts.flatten(0, 1), x=rows), strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    assert torch.equal(transcoder.active_groups(x).flatten(), transcoder.active_groups(rows))
    # one row alone; its GEMM rounds in another order
    torch.testing.assert_close(transcoder(x[0, 0]), transcoder(x)[0, 0])


def test_another_width_is_refused() -> None:
    with pytest.raises(UserError, match="the input is 10 wide, and this transcoder reads 12"):
        make(skip=False)(torch.zeros(3, 10))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_broken_weights_are_refused(name: str, value: float) -> None:
    transcoder = make(skip=True)
    weights = {key: p.clone() for key, p in transcoder.named_parameters()}
    weights[name].view(-1)[1] = value
    with pytest.raises(UserError, match=f"1 of the .* values of {name} are not finite"):
        transcoder.set_weights(weights)
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2):
        weights[name] = torch.zeros(weights[name].shape).to(dtype)
        with pytest.raises(UserError, match=f"weights {name} are {str(dtype).removeprefix('torch.')}; .*float32"):
            transcoder.set_weights(weights)


def test_a_latent_may_never_fire() -> None:
    transcoder = make(skip=False)
    weights = {key: p.clone() for key, p in transcoder.named_parameters()}
    weights["threshold"][1] = torch.inf
    transcoder.set_weights(weights)
    assert float(transcoder.encode(torch.randn(50, 12))[:, 1].abs().max()) == 0


def test_repr_says_what_it_is() -> None:
    assert repr(make(skip=True)) == (
        "Transcoder(blocks.3.hook_resid_mid as resid_mid -> ? of m, 12 -> 28 latents -> 10, prefixes 4, 12, 28, k 3, "
        "skip)"
    )
    assert "k unknown" in repr(make(skip=False, k=None))
    assert make(skip=False, k=None).prefix(2).config.k is None
