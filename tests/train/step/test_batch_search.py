"""BatchTopK of the CUDA branch against a sort of the whole matrix: ties, tiles, low precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import train.step.batch_search as batch_search
from train.step.batch_search import search_batch
from train.step.sparse_acts import SparseActs

D_IN, D_SAE, BATCH = 24, 300, 40
LOW = [None, torch.bfloat16, torch.float16]


def problem(seed: int, *, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, W_enc = torch.randn(BATCH, D_IN, generator=g), torch.randn(D_SAE, D_IN, generator=g)
    b_enc = 0.3 * torch.randn(D_SAE, generator=g)
    return (x.round(), W_enc.round(), b_enc.round()) if ties else (x, W_enc, b_enc)


def twin(x: Tensor, W_enc: Tensor, b_enc: Tensor, n: int) -> list[int]:
    """row * d_sae + latent of the n largest, then only the positive: one stable sort of everything."""
    pre = torch.addmm(b_enc, x, W_enc.T).flatten()
    order = pre.sort(descending=True, stable=True).indices[:n]
    return sorted(int(i) for i in order if pre[i] > 0)


def flat(kept: SparseActs) -> list[int]:
    assert kept.selected is not None
    chosen = kept.selected.nonzero().squeeze(1)
    return (kept.rows[chosen].long() * D_SAE + kept.latents[chosen]).tolist()


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("width", [64, 100, 300])
@pytest.mark.parametrize("n", [1, 37, 400, BATCH * D_SAE])
def test_search_equals_one_sort(monkeypatch, low, ties, width, n):
    if low is not None:
        n = min(n, BATCH * D_SAE // 4)  # an n-th value near zero can be rounded to the other side of it
    monkeypatch.setattr(batch_search, "TILE_BYTES", width * BATCH * (4 if low is None else 2))
    monkeypatch.setattr(batch_search, "_MIN_SPARE", 300)
    x, W_enc, b_enc = problem(0, ties=ties)
    kept = search_batch(x, W_enc, b_enc, n, low=low)
    assert kept.acts.shape == (n,)
    assert flat(kept) == twin(x, W_enc, b_enc, n)  # in this order, too
    assert kept.selected is not None
    assert (kept.acts[~kept.selected] == 0).all()
    pre = torch.addmm(b_enc, x, W_enc.T)[kept.rows.long(), kept.latents.long()]
    torch.testing.assert_close(kept.acts[kept.selected], pre[kept.selected])


@pytest.mark.parametrize("low", LOW[1:])
def test_fp32_decides_near_the_nth_value_alone(monkeypatch, low):
    monkeypatch.setattr(batch_search, "_MIN_SPARE", 60)
    x, W_enc, b_enc = problem(1)
    n = 400
    kept = search_batch(x, W_enc, b_enc, n, low=low, exact=False)
    assert flat(kept) == twin(x, W_enc, b_enc, n)
    pre = torch.addmm(b_enc, x, W_enc.T)[kept.rows.long(), kept.latents.long()]
    torch.testing.assert_close(kept.acts, pre, rtol=2**-6, atol=0)
    near = pre.sort().indices[:40]
    torch.testing.assert_close(kept.acts[near], pre[near])
    assert int((kept.acts == pre.to(low).float()).sum()) >= n / 4  # the others are as they came
    assert int((kept.acts != pre).sum()) >= n / 2


def test_low_precision_alone_would_keep_others():
    x, W_enc, b_enc = problem(1)
    rough = torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc.bfloat16().T).float().flatten()
    alone = set(rough.sort(descending=True, stable=True).indices[:400].tolist())
    assert alone != set(twin(x, W_enc, b_enc, 400))


def test_fewer_entries_than_asked_for():
    x, W_enc, b_enc = problem(2)
    kept = search_batch(x[:1], W_enc[:5], b_enc[:5], 9, low=torch.float16)
    assert kept.acts.shape == (5,)


def test_a_row_that_is_too_large_for_fp16_is_found_and_computed_in_fp32():
    x, W_enc, b_enc = problem(3)
    x[7] *= 1e5
    kept = search_batch(x, W_enc, b_enc, 200, low=torch.float16)
    assert flat(kept) == twin(x, W_enc, b_enc, 200)
    assert float(kept.acts.max()) > 1e5
