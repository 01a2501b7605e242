"""Dead and dense shares and the density histogram, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate.analyses.reconstruction.latents import LOG10_DENSITY_EDGES, LatentSums, group_latents, latent_range
from evaluate.measures.activations import active_latents
from evaluate.measures.redundancy import Neighbours
from matryoshka.metrics import FiringCounts


def neighbours(cosine: torch.Tensor) -> Neighbours:
    return Neighbours(cosine, torch.zeros(len(cosine), dtype=torch.int64))


def firing(counts: list[int], n_rows: int) -> FiringCounts:
    sums = FiringCounts(len(counts))
    sums.n_rows, sums.counts = n_rows, torch.tensor(counts)
    return sums


def test_shares_and_histogram_by_hand() -> None:
    sums = firing([0, 1, 10, 101, 1000, 0, 100], 1000)
    cosine = torch.tensor([0.25, 0.95, 0.0, 0.5, 0.5, 0.0, 0.0])
    first, second = group_latents(sums, neighbours(cosine), (3, 4))
    assert (first.mean_max_cosine, first.redundant_share) == pytest.approx((0.4, 1 / 3))
    assert (second.mean_max_cosine, second.redundant_share) == pytest.approx((0.25, 0.0))
    assert (first.n_latents, first.n_dead, first.dead_share, first.dense_share) == (3, 1, 1 / 3, 0.0)
    # 0.101 and 1.0 are above a tenth, 0.1 is not
    assert (second.n_latents, second.n_dead, second.dead_share, second.dense_share) == (4, 1, 0.25, 0.5)
    bins = dict(zip(LOG10_DENSITY_EDGES, first.log10_density_counts, strict=False))
    assert bins[-3.0] == 1
    assert bins[-2.0] == 1
    assert sum(first.log10_density_counts) == 2
    bins = dict(zip(LOG10_DENSITY_EDGES, second.log10_density_counts, strict=False))
    assert bins[-1.0] == 2
    assert bins[-0.5] == 1
    assert len(first.log10_density_counts) == len(LOG10_DENSITY_EDGES) - 1


def test_total_is_the_sum_of_the_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (48,), generator=generator) * torch.randint(0, 2, (48,), generator=generator)
    sums = firing(counts.tolist(), 50)
    near = neighbours(torch.zeros(48))
    total, groups = latent_range(sums, near, 0, 48), group_latents(sums, near, (6, 11, 31))
    assert total.n_dead == sum(group.n_dead for group in groups) == int((counts == 0).sum())
    columns = zip(*(group.log10_density_counts for group in groups), strict=True)
    assert total.log10_density_counts == tuple(map(sum, columns))
    assert sum(total.log10_density_counts) + total.n_dead == 48


def test_a_single_latent_has_no_redundancy() -> None:
    latents = latent_range(firing([1], 2), neighbours(torch.tensor([float("nan")])), 0, 1)
    assert latents.mean_max_cosine is None
    assert latents.redundant_share is None


def test_activations_against_dense_ones(made: Any) -> None:
    transcoder = made.transcoder()
    transcoder.threshold[9] = 1e9
    x = torch.randn(37, made.d_in, generator=torch.Generator().manual_seed(1))
    sums = LatentSums(48)
    for part in x.split(10):
        sums.add(active_latents(transcoder, part))
    acts = transcoder.encode(x).double()
    mean = sums.mean_when_active()
    for latent in range(48):
        column = acts[:, latent]
        fired = column[column > 0]
        assert int(sums.firing.counts[latent]) == len(fired)
        if len(fired) == 0:
            assert bool(mean[latent].isnan())
            assert float(sums.largest[latent]) == 0
        else:
            assert float(mean[latent]) == pytest.approx(float(fired.mean()), rel=1e-5)
            assert float(sums.largest[latent]) == pytest.approx(float(fired.max()), rel=1e-6)
    assert int(sums.firing.counts[9]) == 0
