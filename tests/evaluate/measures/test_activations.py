"""The sparse form of encode and decode, against the transcoder's own dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate.measures import activations as active_module
from evaluate.measures.activations import (
    SparseActs,
    active_latents,
    base_output,
    group_counts,
    group_sums,
    nested_reconstructions,
)
from matryoshka.transcoder import Transcoder


def reconstructions(transcoder: Transcoder, active: SparseActs, x: torch.Tensor) -> list[torch.Tensor]:
    per_group = group_sums(transcoder, active, group_counts(transcoder, active))
    return [y_hat.clone() for y_hat in nested_reconstructions(base_output(transcoder, x), per_group)]


@pytest.mark.parametrize("tile_bytes", [1, 48 * 4 * 5, 2**28])
def test_active_latents_are_the_nonzero_ones(made: Any, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_module, "TILE_BYTES", tile_bytes)
    transcoder = made.transcoder()
    x = torch.randn(23, made.d_in, generator=torch.Generator().manual_seed(1))
    x[4] = -5 * transcoder.W_enc.sum(1)  # a row on which little fires
    active = active_latents(transcoder, x)
    dense = torch.zeros(23, 48)
    dense[active.row, active.latent] = active.value
    torch.testing.assert_close(dense, transcoder.encode(x))
    assert len(active.value) == int((transcoder.encode(x) != 0).sum())
    key = active.row * 48 + active.latent
    assert bool((key[1:] > key[:-1]).all())


def test_a_negative_threshold_lets_no_negative_activation_through(made: Any) -> None:
    transcoder = made.transcoder()
    transcoder.threshold.fill_(-10.0)
    x = torch.randn(9, made.d_in, generator=torch.Generator().manual_seed(2))
    assert (active_latents(transcoder, x).value > 0).all()


@pytest.mark.parametrize("skip", [False, True])
def test_reconstructions_equal_the_dense_ones(made: Any, skip: bool) -> None:
    transcoder = made.transcoder(skip=skip)
    x = torch.randn(19, made.d_in, generator=torch.Generator().manual_seed(3))
    x[0] = x[-1] = -100 * transcoder.b_enc.sign()[:12]  # rows at both ends, whatever fires there
    dense = transcoder.encode(x)
    active = active_latents(transcoder, x)
    got = reconstructions(transcoder, active, x)
    for own, theirs in zip(got, transcoder.nested(dense, x=x), strict=True):
        torch.testing.assert_close(own, theirs)
    start = 0
    for group, end in enumerate(transcoder.prefix_ends):
        assert torch.equal(group_counts(transcoder, active)[:, group], (dense[:, start:end] != 0).sum(1))
        start = end


def test_nothing_fires(made: Any) -> None:
    transcoder = made.transcoder()
    transcoder.threshold.fill_(1e9)
    x = torch.randn(3, made.d_in, generator=torch.Generator().manual_seed(4))
    active = active_latents(transcoder, x)
    assert len(active.value) == 0
    for y_hat in reconstructions(transcoder, active, x):
        assert torch.equal(y_hat, transcoder.b_dec.expand(3, -1))


def test_no_rows(made: Any) -> None:
    """What a selection of rows may leave: the top-k mode of a batch in which it equals the threshold mode."""
    transcoder = made.transcoder()
    none = torch.zeros(0, dtype=torch.int64)
    nested = reconstructions(transcoder, SparseActs(0, none, none, torch.zeros(0)), torch.zeros(0, made.d_in))
    assert [y_hat.shape for y_hat in nested] == [(0, made.d_out)] * len(transcoder.prefix_ends)
