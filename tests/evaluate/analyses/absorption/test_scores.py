"""Probes, main latents and the published absorption scores: hand-checkable cases and slow twins."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.analyses.absorption.main_latents import find_main_latents
from evaluate.analyses.absorption.scores import absorption_fraction, score_rows
from evaluate.analyses.probing.k_probes import balanced, dense_top_k, k_sparse, mean_difference
from evaluate.measures.bootstrap import mean_over_classes
from evaluate.measures.probe import fit_probe, l1_weights, quality, require_sklearn
from evaluate.measures.row_acts import RowActs
from matryoshka.errors import UserError


def codes_of(dense: Tensor) -> RowActs:
    row, latent = dense.nonzero(as_tuple=True)
    starts = torch.nn.functional.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    return RowActs(dense.shape[1], starts, latent, dense[row, latent])


def test_quality_by_hand() -> None:
    y = np.array([True, True, True, False, False, False, False])
    said = np.array([True, True, False, True, False, False, False])
    found = quality(y, said)
    assert (found.accuracy, found.precision, found.recall) == pytest.approx((5 / 7, 2 / 3, 2 / 3))
    assert found.f1 == pytest.approx(2 / 3)
    assert quality(y, ~y).f1 == 0.0


@pytest.mark.parametrize("balance", [True, False])
def test_the_probe_minimises_its_loss(balance: bool) -> None:
    """The gradient of the written-out loss vanishes there, at scales and offsets that differ by column."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)) * np.array([1, 10, 0.1, 1, 3]) + np.array([0, 50, 0, -2, 1])
    y = x[:, 0] + rng.normal(size=300) > 1.0
    probe = fit_probe(x, y, c=0.3, balanced=balance)
    mean, scale = x.mean(0), x.std(0)
    z, w = (x - mean) / scale, torch.tensor(probe.weight * scale, requires_grad=True)
    b = torch.tensor(probe.bias + float(probe.weight @ mean), requires_grad=True)
    weight = np.where(y, 150 / y.sum(), 150 / (~y).sum()) if balance else np.ones(300)
    sign = torch.tensor(np.where(y, 1.0, -1.0))
    losses = torch.nn.functional.softplus(-sign * (torch.tensor(z) @ w + b)) * torch.tensor(weight)
    (0.3 * losses.sum() + w.square().sum() / 2).backward()
    assert w.grad is not None
    assert b.grad is not None
    assert float(w.grad.abs().max()) < 2e-2
    assert float(b.grad.abs()) < 2e-2
    assert np.linalg.norm(probe.direction()) == pytest.approx(1.0)


def test_a_column_that_never_varies_does_no_harm() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    x[:, 1] = 4.0
    probe = fit_probe(x, x[:, 0] > 0, c=1.0, balanced=True)
    assert np.isfinite(probe.weight).all()
    assert quality(x[:, 0] > 0, probe.score(x) > 0).f1 > 0.9


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    require_sklearn()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"\[probing\]"):
        require_sklearn()


def split_class(n: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Latent 4 fires on two thirds of the class, latent 9 on the rest, the others on anything."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, generator=generator) < 0.2
    acts = torch.relu(torch.randn(n, 12, generator=generator) - 1)
    first = torch.rand(n, generator=generator) < 2 / 3
    acts[:, 4] = (y & first) * 2.0
    acts[:, 9] = (y & ~first) * 1.5
    return acts, y.numpy()


def test_a_split_class_has_both_its_latents_and_a_whole_one_has_one() -> None:
    (train, y_train), (test, y_test) = split_class(2000, 0), split_class(1000, 1)
    both = find_main_latents(codes_of(train), y_train, codes_of(test), y_test, jump=0.03, seed=0)
    assert set(both.latents) == {4, 9}
    recall = 2 / 3 if both.latents[0] == 4 else 1 / 3
    assert both.f1[0] == pytest.approx(2 * recall / (1 + recall), abs=0.05)  # at a precision of 1
    assert both.f1[1] == 1.0
    train[:, 4], test[:, 4] = torch.from_numpy(y_train) * 2.0, torch.from_numpy(y_test) * 2.0
    one = find_main_latents(codes_of(train), y_train, codes_of(test), y_test, jump=0.03, seed=0)
    assert one.latents == (4,)
    assert one.f1[0] == 1.0
    # A jump that is never reached leaves the best one alone.
    train, test = split_class(2000, 0)[0], split_class(1000, 1)[0]
    assert len(find_main_latents(codes_of(train), y_train, codes_of(test), y_test, jump=0.7, seed=0).latents) == 1


def test_latents_that_speak_against_a_class_are_not_its_main_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(1000, generator=generator) < 0.3
    acts = (~y).float()[:, None] * torch.ones(1000, 3)
    found = find_main_latents(codes_of(acts), y.numpy(), codes_of(acts), y.numpy(), jump=0.03, seed=0)
    assert found.latents == ()


def test_l1_weights_do_not_depend_on_the_unit_of_the_activations() -> None:
    acts, y = split_class(500, 2)
    weights = [l1_weights(codes_of(acts * unit).scipy(), y, l1=0.01, seed=0) for unit in (1.0, 64.0)]
    assert np.allclose(weights[0], weights[1])
    assert (weights[0] == 0).sum() >= 3
    assert set(np.argsort(-weights[0])[:2]) == {4, 9}


@pytest.mark.parametrize(
    ("total", "main", "others", "expected"),
    [
        (10.0, 0.0, [5.0], 1.0),  # nothing of the main latents is left
        (10.0, 0.0, [3.9], 0.0),  # too little of it is written by others
        (10.0, 0.0, [2.0, 1.9], 0.0),
        (10.0, 0.0, [2.0, 1.0, 1.0, 1.0], 1.0),  # the three largest count: 4 of 10
        (10.0, 0.0, [1.5, 1.2, 1.0, 1.0], 0.0),  # 3.7 of 10
        (10.0, 4.0, [6.0], 0.6),
        (10.0, 4.0, [8.0], 0.6),  # no more than what is left
        (10.0, 4.0, [4.0], 0.5),
        (10.0, 11.0, [8.0], 0.0),
        (10.0, -1.0, [8.0], 1.0),
        (-1.0, 0.0, [8.0], 0.0),
        (10.0, 0.0, [], 0.0),
    ],
)
def test_absorption_fraction_by_hand(total: float, main: float, others: list[float], expected: float) -> None:
    assert absorption_fraction(total, main, np.array(others)) == pytest.approx(expected)


def test_full_absorption_by_hand() -> None:
    """Latent 0 is the main one. Rows: it fires; 2 absorbs; 1 does weakly; an unaligned one; nothing; total below 0."""
    acts = torch.zeros(6, 4)
    acts[0, 0], acts[0, 2] = 1.0, 9.0
    acts[1, 1], acts[1, 2] = 1.0, 3.0
    acts[2, 1] = 3.0
    acts[3, 3] = 50.0
    acts[5, 2] = 3.0
    total = np.array([10.0, 5.0, 8.0, 1.0, 5.0, -2.0])
    along, cosine = np.array([1.0, 1.0, 1.0, 0.1]), np.array([0.9, 0.5, 0.5, 0.02])
    found = score_rows(codes_of(acts), total, along, cosine, (0,))
    assert found.full.tolist() == [False, True, False, False, False, False]
    assert found.missed.tolist() == [False, True, True, True, True, True]
    assert found.absorber.tolist() == [-1, 2, -1, -1, -1, -1]
    assert found.absorbers() == {2: 1}
    assert found.fraction.tolist() == [0.9, 1.0, 0.0, 0.0, 0.0, 0.0]


def slow_scores(acts: Tensor, total: np.ndarray, along: np.ndarray, cosine: np.ndarray, main: tuple[int, ...]) -> Any:
    """The definition, with every latent of every row, whether it fires or not."""
    fractions, fulls = [], []
    for f, projection in zip(acts.double().numpy(), total, strict=True):
        written = f * along
        others = [i for i in range(len(f)) if i not in main and cosine[i] >= 0.1 and written[i] > 0]
        top3 = sum(sorted((written[i] for i in others), reverse=True)[:3])
        ours = sum(written[i] for i in main)
        if projection <= 0 or ours >= projection or top3 / projection < 0.4:
            fraction = 0.0
        elif ours <= 0:
            fraction = 1.0
        else:
            absorbed = min(top3, projection - ours)
            fraction = absorbed / (absorbed + ours)
        top = int(np.argmax(written))
        fulls.append(
            all(f[i] == 0 for i in main)
            and projection > 0
            and cosine[top] >= 0.025
            and written[top] / projection >= 0.4
        )
        fractions.append(fraction)
    return fractions, fulls


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.relu(torch.randn(400, 17, generator=generator) - 1.2)
    rng = np.random.default_rng(seed)
    along, total = rng.normal(size=17), rng.normal(size=400) + 1
    cosine, main = along / 3, (3, 8)
    found = score_rows(codes_of(acts), total, along, cosine, main)
    fractions, fulls = slow_scores(acts, total, along, cosine, main)
    assert np.allclose(found.fraction, fractions)
    assert found.full.tolist() == fulls
    assert 10 < found.full.sum() < 200
    assert len(np.unique(found.fraction)) > 5


def test_the_interval_of_a_mean_over_classes() -> None:
    values = [np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 0, 0, 0])]
    words = [np.array([5, 5, 6, 6]), np.array([1, 1, 1, 2, 3, 3])]
    point, interval = mean_over_classes(values, words, 2000, seed=0)
    assert point == 0.5
    assert interval is not None
    assert 0 <= interval[0] < 0.5 < interval[1] <= 1
    assert mean_over_classes(values, words, 2000, seed=0) == (point, interval)
    assert mean_over_classes(values, words, 0, seed=0) == (0.5, None)
    assert mean_over_classes([np.ones(3)], [np.array([4, 4, 4])], 50, seed=0) == (1.0, None)
    # One word a row: the bootstrap of a plain mean, whose standard deviation is known.
    many = np.random.default_rng(0).random(400) < 0.3
    _, interval = mean_over_classes([many.astype(float)], [np.arange(400)], 4000, seed=1)
    assert interval is not None
    half = 1.96 * (many.mean() * (1 - many.mean()) / 400) ** 0.5
    assert (interval[1] - interval[0]) / 2 == pytest.approx(half, rel=0.1)


def test_examples_are_balanced_and_the_others_share_alike() -> None:
    label = torch.tensor([0] * 30 + [1] * 100 + [2] * 40 + [3] * 3)
    found = balanced(label, 0, 24, torch.Generator().manual_seed(0))
    assert found.is_class.sum() == 24
    assert (~found.is_class).sum() == 24
    assert bool((label[found.rows[torch.from_numpy(found.is_class)]] == 0).all())
    others = torch.bincount(label[found.rows[torch.from_numpy(~found.is_class)]], minlength=4)
    assert others.tolist() in ([0, 11, 10, 3], [0, 10, 11, 3])
    assert len(set(found.rows.tolist())) == len(found.rows)
    # As many of both as the scarcer side has.
    assert len(balanced(label, 1, 100, torch.Generator().manual_seed(0)).rows) == 2 * 73
    assert len(balanced(label[:30], 0, 24, torch.Generator().manual_seed(0)).rows) == 0


def test_the_mean_difference_and_its_probe_against_a_slow_twin() -> None:
    acts, y = split_class(800, 3)
    label = torch.from_numpy(y).long()
    on = balanced(label, 1, 100, torch.Generator().manual_seed(0))
    chosen = acts[on.rows].double()
    slow = (chosen[torch.from_numpy(on.is_class)].mean(0) - chosen[torch.from_numpy(~on.is_class)].mean(0)).abs()
    assert torch.allclose(mean_difference(codes_of(acts), on), slow)
    test, y_test = split_class(500, 4)
    scored_on = balanced(torch.from_numpy(y_test).long(), 1, 80, torch.Generator().manual_seed(1))
    probes = k_sparse(codes_of(acts), on, codes_of(test), scored_on, (1, 2, 30))
    assert [probe.latents for probe in probes[:2]] == [(4,), (4, 9)]
    assert len(probes[2].latents) == 12
    assert probes[1].quality.accuracy == 1.0
    assert 0.7 < probes[0].quality.accuracy < 0.95
    dense = dense_top_k(acts.numpy(), on, test.numpy(), scored_on, 2, 1.0)
    assert dense.accuracy == 1.0
    assert dense_top_k(acts.numpy(), on, test.numpy(), scored_on, None, 1.0).accuracy > 0.95
