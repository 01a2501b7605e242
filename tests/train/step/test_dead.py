"""Dead latents as a list of fixed length and as a matrix, against dense autograd over the columns of the dead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import train.step.dead as module
from train.step.dead import DeadBlock, list_dead, select_listed

D_IN, D_OUT, D_SAE, BATCH = 12, 10, 48, 32


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(BATCH, D_IN, generator=g), torch.randn(D_SAE, D_IN, generator=g)
    return x, W_enc, torch.randn(D_SAE, generator=g), torch.randn(D_SAE, D_OUT, generator=g)


def dead_ones(n: int) -> Tensor:
    is_dead = torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(n))[:n]] = True
    return is_dead


@pytest.mark.parametrize("tile", [1, 9 * BATCH, 1 << 20])
@pytest.mark.parametrize(("n_dead", "capacity"), [(0, 5), (3, 5), (7, 7), (20, 33), (48, 48)])
def test_a_list_and_its_matrix_equal_dense_autograd(
    monkeypatch: pytest.MonkeyPatch, n_dead: int, capacity: int, tile: int
) -> None:
    monkeypatch.setattr(module, "WIDE_ELEMENTS", tile)
    x, W_enc, b_enc, W_dec = problem()
    is_dead = dead_ones(n_dead)
    listed = list_dead(is_dead, capacity)
    assert listed[:n_dead].tolist() == is_dead.nonzero().squeeze(1).tolist()
    assert (listed[n_dead:] == -1).all()
    kept = select_listed(x, W_enc, b_enc, listed, 7, low=None)
    assert kept.acts.shape == (BATCH * min(7, capacity),)

    weights = [t.double().requires_grad_() for t in (W_enc, b_enc, W_dec)]
    pre = x.double() @ weights[0].T + weights[1]
    top = torch.where(is_dead, pre, -torch.inf).topk(min(7, n_dead), dim=1).indices
    acts = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top))
    want = acts @ weights[2]
    g = torch.Generator().manual_seed(5)
    d_plane = torch.randn(BATCH, D_OUT, generator=g)
    want.backward(d_plane.double())

    block, plane = DeadBlock.of(kept, listed, BATCH, None), torch.empty(BATCH, D_OUT)
    assert int(block.chosen.sum()) == BATCH * min(7, n_dead)
    block.decode_(W_dec, plane)
    torch.testing.assert_close(plane.double(), want, rtol=1e-5, atol=1e-5)
    found = block.gradients(x, W_dec, d_plane)
    for name, weight in zip(("W_enc", "b_enc", "W_dec"), weights, strict=True):
        gradient = torch.zeros(D_SAE, D_OUT) if weight.grad is None else weight.grad
        whole = found.add_to(name, torch.ones_like(gradient, dtype=torch.float32))
        torch.testing.assert_close(whole.double() - 1, gradient.double(), rtol=1e-4, atol=1e-5)
        part = found.add_to(name, torch.ones_like(whole[10:30]), 10)
        torch.testing.assert_close(part, whole[10:30])
    dot = found.add_to("decoder_dot", torch.zeros(D_SAE))
    gradient = torch.zeros_like(W_dec).double() if weights[2].grad is None else weights[2].grad
    torch.testing.assert_close(dot.double(), (gradient * W_dec).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_operands_give_nearly_the_same(low: torch.dtype) -> None:
    x, W_enc, b_enc, W_dec = problem()
    listed = list_dead(dead_ones(20), 24)
    planes = []
    for precision in (None, low):
        kept = select_listed(x, W_enc, b_enc, listed, 20, low=precision)
        planes.append(torch.empty(BATCH, D_OUT))
        DeadBlock.of(kept, listed, BATCH, precision).decode_(W_dec, planes[-1])
    assert not torch.equal(*planes)
    assert float((planes[0] - planes[1]).norm()) < 2**-7 * float(planes[0].norm())
