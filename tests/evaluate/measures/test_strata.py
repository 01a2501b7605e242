"""FVU of parts of the rows, against a loop over the parts."""

from __future__ import annotations

import pytest
import torch

from evaluate.measures.strata import StrataSums

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


def test_draws_of_parts_against_a_loop(rows: dict[str, torch.Tensor]) -> None:
    drawn = summed(rows).drawn(70, seed=3)
    assert drawn is not None
    present = [part for part in range(PARTS) if part != 4]
    generator = torch.Generator().manual_seed(3)
    mean = rows["y"].double().numpy().mean(0)
    for fvu, l0 in zip(*drawn, strict=True):
        parts = [present[unit] for unit in torch.randint(len(present), (len(present),), generator=generator).tolist()]
        members = [row for part in parts for row in (rows["strata"] == part).nonzero().flatten().tolist()]
        variance = ((rows["y"][members].double().numpy() - mean) ** 2).sum()
        for prefix in range(G):
            error = rows["sq_err"][prefix][members].double().numpy().sum()
            assert float(fvu[prefix]) == pytest.approx(error / variance, rel=1e-5)
            assert float(l0[prefix]) == pytest.approx(rows["l0"][prefix][members].double().numpy().mean())


def test_the_seed_decides_and_one_part_is_not_drawn(rows: dict[str, torch.Tensor]) -> None:
    sums = summed(rows)
    one, same, other = (sums.drawn(30, seed=seed) for seed in (1, 1, 2))
    assert one is not None
    assert same is not None
    assert other is not None
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    assert sums.drawn(0, seed=1) is None
    assert summed({**rows, "strata": torch.full((N,), 2)}).drawn(30, seed=1) is None
