"""Rows by their place, sparse codes, and the read-back decoder, each against a slow twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evaluate.analyses.absorption.readback import fit_readback, norm_directions
from evaluate.measures.row_acts import RowActs, encode_rows
from evaluate.rows.gather import gather_source
from matryoshka.shards import ShardSet


def codes_of(dense: Tensor) -> RowActs:
    row, latent = dense.nonzero(as_tuple=True)
    starts = torch.nn.functional.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    assert len(row) == int(starts[-1])
    return RowActs(dense.shape[1], starts, latent, dense[row, latent])


def sparse(n_rows: int, n_latents: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(n_rows, n_latents, generator=generator) - 1)


def test_gathered_rows_are_those_of_the_places(made: Any, val_set: ShardSet) -> None:
    rows = made.kept_rows(val_set)
    order = torch.randperm(len(rows["token"]), generator=torch.Generator().manual_seed(0))[:40]
    seen: list[int] = []
    found = gather_source(val_set.val, rows["context"][order], rows["position"][order], val_set.d_in, seen.append)
    assert torch.equal(found, rows["source"][order])
    assert sum(seen) == 40


def test_codes_are_the_transcoders(made: Any) -> None:
    transcoder = made.transcoder()
    x = torch.randn(25, made.d_in, generator=torch.Generator().manual_seed(1))
    x[7] = -100 * transcoder.W_enc.sum(1)  # hardly anything fires
    dense = transcoder.encode(x)
    codes = encode_rows(transcoder, x)
    every = torch.arange(transcoder.config.d_sae)
    assert torch.equal(codes.dense(every), dense)
    assert torch.equal(torch.from_numpy(codes.scipy().toarray()), dense)
    for end in transcoder.prefix_ends:
        assert torch.equal(codes.prefix(end).dense(every[:end]), dense[:, :end])
    chosen = torch.arange(25) % 3 == 1
    some = torch.tensor([40, 3, 17])
    assert torch.equal(codes.rows(chosen).dense(some), dense[chosen][:, some])


def test_the_readback_is_the_ridge_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal equations with the penalty written out, in float64."""
    monkeypatch.setattr("evaluate.analyses.absorption.readback._TOLERANCE", 1e-5)
    f = sparse(300, 24, seed=0)
    f[:, 5] = 0  # never fires
    f[:, 6] = 0
    f[11, 6] = 2.0  # fires once
    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(1)) + f @ torch.ones(24, 9)
    random = norm_directions(9, seed=0)
    directions = torch.eye(9)
    found = fit_readback(codes_of(f), x @ torch.cat([directions, random], dim=1))

    centred = (f - f.mean(0)).double()
    n_fires = (f > 0).sum(0).clamp_min(1)
    unit = f.double().square().sum(0) / n_fires
    unit[5] = 1
    V = torch.linalg.solve(centred.T @ centred + torch.diag(unit), centred.T @ (x - x.mean(0)).double())
    assert torch.allclose(found.along.double(), V, atol=2e-3)
    assert torch.equal(found.along[5], torch.zeros(9))
    assert torch.allclose(found.norm.double(), (V @ random.double()).norm(dim=1), atol=2e-3)
    intercept = x.mean(0).double() - f.mean(0).double() @ V
    assert torch.allclose(found.intercept.double(), intercept, atol=2e-3)
    assert torch.equal(found.cosine()[5], torch.zeros(9))


def test_a_latent_that_was_seen_once_has_half_of_its_row() -> None:
    f = torch.zeros(4000, 1)
    f[0] = 3.0
    x = torch.zeros(4000, 2)
    x[0] = torch.tensor([6.0, 0.0])
    found = fit_readback(codes_of(f), x @ torch.cat([torch.eye(2), norm_directions(2, 0)], dim=1))
    assert found.along[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-2)


def test_of_an_sae_that_is_exact_the_readback_is_the_decoder() -> None:
    f = sparse(3000, 16, seed=2)
    W_dec = torch.nn.functional.normalize(torch.randn(16, 8, generator=torch.Generator().manual_seed(3)), dim=1)
    b_dec = torch.linspace(-1, 1, 8)
    x = f @ W_dec + b_dec
    found = fit_readback(codes_of(f), x @ torch.cat([torch.eye(8), norm_directions(8, 0)], dim=1))
    assert torch.allclose(found.along, W_dec, atol=0.02)
    assert torch.allclose(found.intercept, b_dec, atol=0.05)
    assert bool((found.norm - 1).abs().max() < 0.4)
    assert float(found.norm.mean()) == pytest.approx(1.0, abs=0.06)


def test_the_norm_directions_estimate_norms() -> None:
    v = torch.randn(50, 30, generator=torch.Generator().manual_seed(4))
    ratio = (v @ norm_directions(30, 0)).norm(dim=1) / v.norm(dim=1)
    assert float(ratio.std()) == pytest.approx(0.09, abs=0.03)
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.05)
