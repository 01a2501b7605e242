"""Nearest decoder directions, against all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluate.measures import redundancy
from evaluate.measures.redundancy import decoder_neighbours


@pytest.mark.parametrize("tile_bytes", [1, 4 * 48 * 7, 2**28])
def test_against_all_pairs(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redundancy, "_TILE_BYTES", tile_bytes)
    W_dec = torch.randn(48, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49)[:, None]
    W_dec[30] = 3 * W_dec[2]
    W_dec[31] = -W_dec[5]
    got = decoder_neighbours(W_dec)
    rows = W_dec.double().numpy()
    for i in range(48):
        cosines = [
            -2.0 if j == i else rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for j in range(48)
        ]
        assert float(got.cosine[i]) == pytest.approx(max(cosines), abs=1e-5)
        assert cosines[int(got.latent[i])] == pytest.approx(max(cosines), abs=1e-5)
    assert int(got.latent[30]) == 2
    assert float(got.cosine[31]) < 0.99


def test_one_latent_has_no_neighbour() -> None:
    got = decoder_neighbours(torch.ones(1, 4))
    assert bool(got.cosine.isnan().all())
    assert got.latent.tolist() == [-1]
