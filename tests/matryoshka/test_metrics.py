"""Metrics as sums, against numpy on all rows at once and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka.metrics import CosineSums, FiringCounts, FvuSums, L0Sums, MeanSums, NormRatioSums

N, D, G = 31, 10, 3


@pytest.fixture
def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(N, D, generator=generator) * 2 + 5 * torch.randn(D, generator=generator)
    return {"y": y, "y_hat": y + torch.randn(G, N, D, generator=generator)}


def batches(sizes: tuple[int, ...] = (1, 17, 13)) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]


def test_fvu_is_one_ratio_of_sums(rows: dict[str, Tensor]) -> None:
    y, sq_err = rows["y"], (rows["y_hat"] - rows["y"]).square().sum(2)
    whole, parts = FvuSums(), []
    for here in batches():
        whole.add(y[here], sq_err[:, here])
        part = FvuSums()
        part.add(y[here], sq_err[:, here])
        parts.append(part)
    merged = FvuSums()
    for part in (FvuSums(), *parts, FvuSums()):
        merged.merge(part)
    target = y.double().numpy()
    variance = ((target - target.mean(0)) ** 2).sum()
    twin = sq_err.double().sum(1).numpy() / variance
    assert whole.value() == pytest.approx(twin, rel=1e-9)
    assert merged.value() == pytest.approx(twin, rel=1e-9)
    assert whole.total_variance() == pytest.approx(variance, rel=1e-9)
    averaged = np.nanmean([part.value() for part in parts], axis=0)
    assert averaged != pytest.approx(twin, rel=1e-2)


def test_fvu_by_hand() -> None:
    sums = FvuSums()
    # dimension means 1 and 10: variance 2 + 0, though the values as one bag would vary a great deal
    sums.add(torch.tensor([[0.0, 10.0], [2.0, 10.0]]), torch.tensor([[1.0, 0.0], [0.25, 0.25]]))
    assert sums.value() == [0.5, 0.25]


def test_no_rows_and_no_variance_give_nan() -> None:
    assert np.isnan(FvuSums().total_variance())
    sums = FvuSums()
    sums.add(torch.ones(3, 2), torch.ones(1, 3))
    assert np.isnan(sums.value()).all()
    assert MeanSums().value() == []
    empty = NormRatioSums()
    empty.add(torch.zeros(2), torch.ones(3, 2))
    assert np.isnan(empty.value()).all()


@pytest.mark.parametrize("kind", [MeanSums, L0Sums, CosineSums])
def test_means(kind: type[MeanSums]) -> None:
    values = torch.rand(G, N, generator=torch.Generator().manual_seed(1))
    whole, merged = kind(), kind()
    for here in batches():
        whole.add(values[:, here])
        part = kind()
        part.add(values[:, here])
        merged.merge(part)
    twin = values.double().mean(1).tolist()
    assert whole.value() == pytest.approx(twin, rel=1e-12)
    assert merged.value() == pytest.approx(twin, rel=1e-12)


def test_norm_ratio(rows: dict[str, Tensor]) -> None:
    y_norm, y_hat_norm = rows["y"].norm(dim=1), rows["y_hat"].norm(dim=2)
    whole, merged = NormRatioSums(), NormRatioSums()
    for here in batches():
        whole.add(y_norm[here], y_hat_norm[:, here])
        part = NormRatioSums()
        part.add(y_norm[here], y_hat_norm[:, here])
        merged.merge(part)
    twin = (y_hat_norm.double().sum(1) / y_norm.double().sum()).tolist()
    assert whole.value() == pytest.approx(twin, rel=1e-12)
    assert merged.value() == pytest.approx(twin, rel=1e-12)
    by_hand = NormRatioSums()
    by_hand.add(torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 0.0]]))
    assert by_hand.value() == [0.5]


def test_firing_counts() -> None:
    generator = torch.Generator().manual_seed(2)
    acts: Any = torch.relu(torch.randn(N, 48, generator=generator) - 1.5)
    acts[:, 7] = 0
    dense, sparse, merged = FiringCounts(48), FiringCounts(48), FiringCounts(48)
    for here in batches():
        dense.add(acts[here])
        sparse.add_active(acts[here].nonzero()[:, 1], len(acts[here]))
        part = FiringCounts(48)
        part.add(acts[here])
        merged.merge(part)
    twin = (acts.numpy() > 0).mean(0)
    for sums in (dense, sparse, merged):
        assert sums.density().numpy() == pytest.approx(twin)
        assert sums.n_rows == N
        assert sums.dead_share(6, 9) == pytest.approx((twin[6:9] == 0).mean())
        assert sums.dead_share() == pytest.approx((twin == 0).mean())


def test_constant_targets_give_nan_though_float64_rounds() -> None:
    """sum(y^2) - n mean^2 of a constant is rounding noise; a ratio to it would be nonsense."""
    for constant in (0.1, 0.3, 1e3 / 7):
        for n_rows in (3, 7, 1000):
            sums = FvuSums()
            sums.add(torch.full((n_rows, 3), constant, dtype=torch.float64), torch.ones(1, n_rows))
            assert np.isnan(sums.value()).all()


def test_sums_of_bfloat16_are_exact_to_float64() -> None:
    """4096 values near 256 in bfloat16: summed in that type the mean would be off by tens of percent."""
    y = (256 + torch.arange(4096.0)[:, None] % 3).bfloat16().repeat(1, 2)
    sums = FvuSums()
    sums.add(y, (y * 0.01).square().sum(1)[None])
    target = y.double().numpy()
    assert sums.total_variance() == pytest.approx(((target - target.mean(0)) ** 2).sum(), rel=1e-6)


def test_sums_of_other_shapes_are_not_stretched() -> None:
    one, three = MeanSums(), MeanSums()
    one.add(torch.ones(1, 4))
    three.add(torch.ones(3, 4))
    with pytest.raises(AssertionError):
        three.merge(one)
    with pytest.raises(AssertionError):
        three.add(torch.ones(1, 4))
    fvu, other = FvuSums(), FvuSums()
    fvu.add(torch.ones(4, 2), torch.ones(3, 4))
    other.add(torch.ones(4, 2), torch.ones(1, 4))
    with pytest.raises(AssertionError):
        fvu.merge(other)
    with pytest.raises(AssertionError):
        fvu.add(torch.ones(4, 2), torch.ones(3, 1))
