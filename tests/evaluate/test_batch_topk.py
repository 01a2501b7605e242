"""The k * rows largest activations of a batch, against sorting all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate import active as active_module
from evaluate.active import active_latents
from evaluate.batch_topk import batch_topk, exclusive_parts
from matryoshka.transcoder import Transcoder


def naive(transcoder: Transcoder, x: torch.Tensor) -> torch.Tensor:
    """Dense activations [rows, d_sae] by sorting every pre-activation of the batch."""
    pre_acts = x @ transcoder.W_enc + transcoder.b_enc
    flat = pre_acts.flatten()
    kept = torch.zeros_like(flat)
    for place in flat.argsort(descending=True)[: transcoder.config.k * len(x)]:
        kept[place] = flat[place].clamp_min(0)
    return kept.view_as(pre_acts)


@pytest.mark.parametrize("floor", [0.0, 0.7, 1.1, 50.0])
@pytest.mark.parametrize("k", [1, 9, 20, 40])
@pytest.mark.parametrize("tile_bytes", [4 * 48 * 5, 2**28])
def test_against_sorting(made: Any, monkeypatch: pytest.MonkeyPatch, floor: float, k: int, tile_bytes: int) -> None:
    monkeypatch.setattr(active_module, "TILE_BYTES", tile_bytes)
    transcoder = made.transcoder(k=k)
    x = torch.randn(13, made.d_in, generator=torch.Generator().manual_seed(1))
    floors = torch.full((48,), floor)
    top = batch_topk(transcoder, x, active_latents(transcoder, x, floors), floors)
    dense = torch.zeros(13, 48)
    dense[top.row, top.latent] = top.value
    torch.testing.assert_close(dense, naive(transcoder, x))
    key = top.row * 48 + top.latent
    assert bool((key[1:] > key[:-1]).all())
    # 40 per row are more than there are positive ones: those with a value of zero are not active
    assert len(top.value) == min(k * 13, int((transcoder.pre_acts(x) > 0).sum()))


def test_a_high_floor_of_one_latent_hides_nothing(made: Any) -> None:
    transcoder = made.transcoder(k=9)
    x = torch.randn(13, made.d_in, generator=torch.Generator().manual_seed(2))
    floors = torch.zeros(48)
    floors[int(transcoder.pre_acts(x).max(0).values.argmax())] = 1e9  # the very strongest is no candidate
    top = batch_topk(transcoder, x, active_latents(transcoder, x, floors), floors)
    dense = torch.zeros(13, 48)
    dense[top.row, top.latent] = top.value
    torch.testing.assert_close(dense, naive(transcoder, x))


def test_exclusive_parts_are_the_difference(made: Any) -> None:
    transcoder = made.transcoder()
    x = torch.randn(11, made.d_in, generator=torch.Generator().manual_seed(3))
    all_active = active_latents(transcoder, x, torch.zeros(48))
    one, other = all_active.where(all_active.latent % 3 > 0), all_active.where(all_active.value > 0.6)
    change = exclusive_parts(one, other, 48)
    dense = torch.zeros(3, 11, 48)
    for place, part in enumerate((one, other, change)):
        dense[place, part.row, part.latent] = part.value
    assert torch.equal(dense[2], dense[1] - dense[0])
    assert len(change.value) == int((dense[2] != 0).sum())
    assert len(exclusive_parts(one, one, 48).value) == 0
