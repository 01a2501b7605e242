"""BatchTopK in tiles against a sort of the whole matrix: any tile, any bound, ties, bf16 candidates."""

import numpy as np
import pytest
import torch
from torch import Tensor

import train.step.selection as selection
from train.step.selection import TileEncoder, flat_nonzero, keep_largest

D_IN, D_SAE, BATCH = 12, 300, 40


def problem(seed: int, *, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, W_enc = torch.randn(BATCH, D_IN, generator=g), torch.randn(D_SAE, D_IN, generator=g)
    b_enc = 0.3 * torch.randn(D_SAE, generator=g)
    return (x.round(), W_enc.round(), b_enc.round()) if ties else (x, W_enc, b_enc)


def twin(x: Tensor, W_enc: Tensor, b_enc: Tensor, n: int) -> list[tuple[int, int]]:
    """(row, latent) of the n largest, then only the positive: one stable sort of everything."""
    pre = torch.addmm(b_enc, x, W_enc.T).flatten()
    order = pre.sort(descending=True, stable=True).indices[:n]
    return sorted((int(i) // D_SAE, int(i) % D_SAE) for i in order if pre[i] > 0)


def pairs(kept) -> list[tuple[int, int]]:
    return sorted(zip(kept.rows.tolist(), kept.latents.tolist(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("width", [64, 100, 300])
@pytest.mark.parametrize("n", [1, 37, 400, 5900, BATCH * D_SAE])
def test_selection_equals_one_sort(monkeypatch, bf16, ties, width, n):
    if bf16 and n > BATCH * D_SAE / 4:
        n = BATCH * D_SAE // 4  # with the n-th value near zero, bf16 can call a tiny positive entry negative
    monkeypatch.setattr(selection, "TILE_ELEMENTS", width * BATCH)
    x, W_enc, b_enc = problem(0, ties=ties)
    encoder = TileEncoder(bf16)
    for _ in range(3):
        kept = encoder.select(x, W_enc, b_enc, n)
        assert pairs(kept) == twin(x, W_enc, b_enc, n)
        pre = torch.addmm(b_enc, x, W_enc.T)
        torch.testing.assert_close(kept.acts, pre[kept.rows.long(), kept.latents.long()])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bound", [0.0, 1e-3, 0.5, 2.0, 1e9])
def test_the_bound_never_changes_the_result(monkeypatch, bf16, bound):
    monkeypatch.setattr(selection, "TILE_ELEMENTS", 64 * BATCH)
    x, W_enc, b_enc = problem(1, ties=True)
    encoder = TileEncoder(bf16)
    encoder._bound = bound
    kept = encoder.select(x, W_enc, b_enc, 300)
    fresh = TileEncoder(bf16).select(x, W_enc, b_enc, 300)
    for name in ("rows", "latents", "acts"):
        assert torch.equal(getattr(kept, name), getattr(fresh, name))


def test_the_bound_really_drops_candidates_and_recovers_from_a_harder_batch():
    x, W_enc, b_enc = problem(2)
    encoder = TileEncoder(bf16=False)
    encoder.select(x, W_enc, b_enc, 200)
    assert encoder._candidates(x, W_enc, b_enc, encoder._bound, 200).acts.numel() < 800
    for scale in (0.1, 10.0, 1e-3):
        kept = encoder.select(scale * x, W_enc, 0 * b_enc, 200)
        assert pairs(kept) == twin(scale * x, W_enc, 0 * b_enc, 200)


def test_bf16_picks_what_fp32_picks_on_ordinary_data():
    g = torch.Generator().manual_seed(3)
    x, W_enc = torch.randn(256, 64, generator=g), torch.randn(1000, 64, generator=g) / 8
    b_enc = torch.zeros(1000)
    chosen = [TileEncoder(bf16).select(x, W_enc, b_enc, 256 * 8) for bf16 in (False, True)]
    assert pairs(chosen[0]) == pairs(chosen[1])


def test_ties_go_to_the_smallest_flat_index():
    values = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 5.0])
    flat = torch.tensor([10, 9, 8, 2, 7, 1])
    assert keep_largest(values, lambda i: flat[i], 5).tolist() == [0, 2, 3, 4, 5]
    assert keep_largest(values, lambda i: flat[i], 4).tolist() == [0, 2, 3, 5]
    assert keep_largest(values, lambda i: flat[i], 9).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [(5, 8), (5, 7), (1, 0), (3, 64)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_flat_nonzero_equals_numpy(size, share):
    mask = np.random.default_rng(0).random(size) < share
    assert flat_nonzero(mask).tolist() == np.flatnonzero(mask).tolist()
