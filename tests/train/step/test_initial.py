"""The first weights: those of whole matrices, made block by block in no more memory than the state's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ledger.counting import Counter
from benchmarks.ledger.fake_cuda import fake_device
from train.batches.conditioning import Conditioning
from train.step import initial as module
from train.step.initial import initial_state

D_IN, D_SAE = 12, 103


def conditioning_of(d_in: int, d_out: int, device: torch.device | None = None) -> Conditioning:
    return Conditioning(
        convention="resid_mid",
        source_site="resid_mid",
        norm=None,
        mu_x=torch.linspace(-1, 1, d_in, device=device),
        s_x=torch.linspace(1, 2, d_in, device=device),
        mean_y=torch.arange(d_out, device=device) / 4,
        s_y=1.5,
        target_variance=float(d_out),
    )


def whole(source: Tensor, target: Tensor, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """W_enc and W_dec from whole matrices: the plain twin."""
    conditioning = conditioning_of(source.shape[1], target.shape[1])
    (n_rows, d_in), d_out = source.shape, target.shape[1]
    g = torch.Generator().manual_seed(seed)
    if init == "pairs":
        rows = torch.arange(D_SAE) % n_rows
        targets = conditioning.target(target) - conditioning.mean_y / conditioning.s_y
        sources = conditioning.input(source)
        decoder, encoder = targets[rows], sources[rows]
        if n_rows < D_SAE:
            decoder = decoder + torch.randn(D_SAE, d_out, generator=g) * targets.std() * 0.1
            encoder = encoder + torch.randn(D_SAE, d_in, generator=g) * sources.std() * 0.1
    else:
        decoder = torch.randn(D_SAE, d_out, generator=g)
        encoder = decoder if d_in == d_out else torch.randn(D_SAE, d_in, generator=g)
    unit = []
    for rows in (encoder, decoder):
        random = torch.randn(*rows.shape, generator=g)
        unit.append(F.normalize(torch.where(rows.norm(dim=1, keepdim=True) < 1e-12, random, rows), dim=1))
    return unit[0] / math.sqrt(d_in), unit[1]


@pytest.mark.parametrize("init", ["pairs", "tied"])
@pytest.mark.parametrize(("n_rows", "d_out"), [(200, 10), (40, 10), (200, 12)])
@pytest.mark.parametrize("block_elements", [1, 16 * 12 * 3, 1 << 22])
def test_blocks_give_the_bits_of_whole_matrices(
    init: str, n_rows: int, d_out: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    conditioning = conditioning_of(D_IN, d_out)
    g = torch.Generator().manual_seed(5)
    source, target = (torch.randn(n_rows, width, generator=g).bfloat16() for width in (D_IN, d_out))
    target[3] = target[30] = conditioning.mean_y.bfloat16()  # equal to the mean: no direction of their own
    W_enc, W_dec = whole(source, target, init, seed=9)
    settings: dict[str, Any] = {"d_sae": D_SAE, "source": source, "target": target, "conditioning": conditioning}
    for latents in (None, range(0, D_SAE, 3), range(2, D_SAE, 3), range(70, D_SAE, 71)):
        state = initial_state(
            **settings, init=init, skip=False, generator=torch.Generator().manual_seed(9), latents=latents
        )
        part = slice(None) if latents is None else slice(latents.start, latents.stop, latents.step)
        assert torch.equal(state.W_enc, W_enc[part])
        assert torch.equal(state.W_dec, W_dec[part])
    assert float(state.W_dec.norm(dim=1).sub(1).abs().max()) < 1e-6


@pytest.mark.parametrize("init", ["pairs", "tied"])
@pytest.mark.parametrize("world", [1, 4])
def test_a_start_takes_no_more_than_the_state_and_a_block(init: str, world: int) -> None:
    """On a GPU, at the size of layer 17."""
    d, d_sae = 2304, 18432
    held = range(1, d_sae, world) if world > 1 else None
    reads = {bool: True, int: 0, float: 0.0}
    with fake_device() as device, Counter(device, numbers=reads) as counter:
        rows = torch.empty(2, d_sae, d, dtype=torch.bfloat16)
        state = initial_state(
            d_sae=d_sae,
            source=rows[0],
            target=rows[1],
            conditioning=conditioning_of(d, d, device),
            init=init,
            skip=False,
            generator=torch.Generator().manual_seed(0),
            latents=held,
        )
        n_bytes = sum(tensor.nbytes for tensor in state.tensors().values())
        assert n_bytes <= counter.peak <= n_bytes + 4 * 4 * module._BLOCK_ELEMENTS
