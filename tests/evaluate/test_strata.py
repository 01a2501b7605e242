"""FVU of parts of the rows, against a loop over the parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluate.bootstrap import _weights, bootstrap_intervals
from evaluate.strata import StrataSums

N, D, G, PARTS = 57, 10, 3, 6


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    strata = torch.randint(0, PARTS, (N,), generator=generator)
    strata[strata == 4] = 1  # a part without rows
    return {
        "strata": strata,
        "y": torch.randn(N, D, generator=generator) + 3 + strata[:, None],
        "sq_err": torch.rand(G, N, generator=generator),
        "l0": torch.randint(0, 30, (G, N), generator=generator),
    }


def summed(rows: dict[str, torch.Tensor]) -> StrataSums:
    sums = StrataSums(PARTS, G, D)
    for start in range(0, N, 10):
        here = slice(start, start + 10)
        sums.add(rows["strata"][here], rows["y"][here], rows["sq_err"][:, here], rows["l0"][:, here])
    return sums


def test_parts_against_a_loop(rows: dict[str, torch.Tensor]) -> None:
    sums = summed(rows)
    fvu, l0 = sums.fvu(), sums.mean_l0()
    y = rows["y"].double().numpy()
    mean = y.mean(0)
    for part in range(PARTS):
        here = (rows["strata"] == part).numpy()
        assert int(sums.n_rows[part]) == here.sum()
        if not here.any():
            assert bool(fvu[part].isnan().all() and l0[part].isnan().all())
            continue
        variance = ((y[here] - mean) ** 2).sum()
        for prefix in range(G):
            error = rows["sq_err"][prefix].double().numpy()[here].sum()
            assert float(fvu[part, prefix]) == pytest.approx(error / variance, rel=1e-5)
            assert float(l0[part, prefix]) == pytest.approx(rows["l0"][prefix].numpy()[here].mean())


def test_parts_average_to_the_total(rows: dict[str, torch.Tensor]) -> None:
    sums = summed(rows)
    y = rows["y"].double()
    total = rows["sq_err"].double().sum(1) / (y - y.mean(0)).square().sum()
    used = sums.n_rows > 0
    share = sums.variance()[used] / sums.variance().sum()
    torch.testing.assert_close(share @ sums.fvu()[used], total, rtol=1e-5, atol=0)


def test_bootstrap_against_a_loop_over_draws(rows: dict[str, torch.Tensor]) -> None:
    sums = summed(rows)
    intervals = bootstrap_intervals(sums, 70, seed=3)
    assert intervals is not None
    present = [part for part in range(PARTS) if part != 4]
    weights = _weights(70, len(present), torch.Generator().manual_seed(3))
    assert torch.equal(weights.sum(1), torch.full((70,), float(len(present)), dtype=torch.float64))
    mean = rows["y"].double().numpy().mean(0)
    fvu, l0 = [], []
    for draw in weights:
        members = [
            row
            for part, times in zip(present, draw.tolist(), strict=True)
            for row in (rows["strata"] == part).nonzero().flatten().tolist() * int(times)
        ]
        y = rows["y"][members].double().numpy()
        variance = ((y - mean) ** 2).sum()
        fvu.append([rows["sq_err"][prefix][members].double().numpy().sum() / variance for prefix in range(G)])
        l0.append([rows["l0"][prefix][members].double().numpy().mean() for prefix in range(G)])
    for got, draws in ((intervals.fvu, fvu), (intervals.l0, l0)):
        assert np.array(got) == pytest.approx(np.quantile(np.array(draws), [0.025, 0.975], axis=0).T, rel=1e-4)


def test_the_seed_decides_and_one_context_has_no_interval(rows: dict[str, torch.Tensor]) -> None:
    sums = summed(rows)
    assert bootstrap_intervals(sums, 30, seed=1) == bootstrap_intervals(sums, 30, seed=1)
    assert bootstrap_intervals(sums, 30, seed=1) != bootstrap_intervals(sums, 30, seed=2)
    assert bootstrap_intervals(sums, 0, seed=1) is None
    single = summed({**rows, "strata": torch.full((N,), 2)})
    assert bootstrap_intervals(single, 30, seed=1) is None
