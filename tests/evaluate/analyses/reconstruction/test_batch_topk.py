"""The k * rows largest activations of a batch, against sorting all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate.analyses.reconstruction.batch_topk import swapped, topk_among, topk_of_all
from evaluate.measures import activations as active_module
from evaluate.measures.activations import SparseActs, active_latents
from matryoshka.transcoder import Transcoder


def chosen(transcoder: Transcoder, x: torch.Tensor, floors: torch.Tensor) -> tuple[SparseActs, bool]:
    """As a measurement does it: among the candidates, or when that is not certain among all."""
    candidates, n = active_latents(transcoder, x, floors), transcoder.config.k * len(x)
    mask = topk_among(candidates, n, floors)
    return (topk_of_all(transcoder, x, n), False) if mask is None else (candidates.where(mask), True)


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
    top, among_candidates = chosen(transcoder, x, torch.full((48,), floor))
    dense = torch.zeros(13, 48)
    dense[top.row, top.latent] = top.value
    torch.testing.assert_close(dense, naive(transcoder, x))
    key = top.row * 48 + top.latent
    assert bool((key[1:] > key[:-1]).all())
    # 40 per row are more than there are positive ones: those with a value of zero are not active
    smallest = transcoder.pre_acts(x).flatten().sort(descending=True).values[k * 13 - 1]
    assert among_candidates == (float(smallest) > floor)
    assert len(top.value) == min(k * 13, int((transcoder.pre_acts(x) > 0).sum()))


def test_a_high_floor_of_one_latent_hides_nothing(made: Any) -> None:
    transcoder = made.transcoder(k=9)
    x = torch.randn(13, made.d_in, generator=torch.Generator().manual_seed(2))
    floors = torch.zeros(48)
    floors[int(transcoder.pre_acts(x).max(0).values.argmax())] = 1e9  # the very strongest is no candidate
    top, among_candidates = chosen(transcoder, x, floors)
    assert not among_candidates
    dense = torch.zeros(13, 48)
    dense[top.row, top.latent] = top.value
    torch.testing.assert_close(dense, naive(transcoder, x))


def test_swapped_is_the_difference(made: Any) -> None:
    transcoder = made.transcoder()
    x = torch.randn(11, made.d_in, generator=torch.Generator().manual_seed(3))
    candidates = active_latents(transcoder, x, torch.zeros(48))
    one, other = candidates.latent % 3 > 0, candidates.value > 0.6
    dense = torch.zeros(3, 11, 48)
    change = swapped(candidates, one, other)
    for place, part in enumerate((candidates.where(one), candidates.where(other), change)):
        dense[place, part.row, part.latent] = part.value
    assert torch.equal(dense[2], dense[1] - dense[0])
    assert len(change.value) == int((dense[2] != 0).sum())
    assert len(swapped(candidates, one, one).value) == 0
