"""Positions, scores and the recovered share, against loops and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluate.language_model import scores as scores_module
from evaluate.language_model.scores import score
from evaluate.measures.recovered import DocumentSums, Estimates, columns, increase, mean_of, recovered
from evaluate.rows.contexts import Contexts, context_batches, scored_positions
from matryoshka.errors import UserError

LN2 = math.log(2)


def test_which_positions_count() -> None:
    tokens = torch.tensor([[1, 5, 6, 7, 0, 8, 9], [1, 5, 5, 5, 5, 5, 5]])
    docs = torch.tensor([[4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 5, 5, 5, 6]])
    replaced, scored = scored_positions(tokens, docs, (0, 1))
    assert replaced.int().tolist() == [[0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1]]
    # not BOS; not before the special token; not the last; not before another document
    assert scored.int().tolist() == [[0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("numbers", [range(8), range(2, 7), [1, 4, 7], []])
def test_batches_are_whole_contexts_in_order(subject: Callable[[str], Any], batch_tokens: int, numbers: Any) -> None:
    one = subject("llama")
    found = list(context_batches(one.shards, one.shards.val, numbers, batch_tokens))
    assert [number for batch in found for number in batch.numbers] == list(numbers)
    everything = one.contexts()
    for batch in found:
        assert len(batch.numbers) <= max(1, batch_tokens // one.shards.ctx_len)
        for i, number in enumerate(batch.numbers):
            tokens, docs = everything[number]
            assert batch.tokens[i].tolist() == tokens
            assert batch.replaced[i].tolist() == [token not in one.special_ids for token in tokens]
            assert batch.scored[i].tolist() == [one.is_scored(tokens, docs, p) for p in range(len(tokens))]
        expected = [
            t for n in batch.numbers for p, t in enumerate(everything[n][0][1:]) if one.is_scored(*everything[n], p)
        ]
        assert batch.next_tokens(batch.scored).tolist() == expected


def test_scores_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2."""
    clean = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]]).log() + 3
    changed = torch.tensor([[[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]]).log() - 1
    where = torch.tensor([[True, False]])
    found = score(clean, changed, where, torch.tensor([1]), ratios=True)
    assert float(found.kl) == pytest.approx(0.25 * LN2)
    assert float(found.ce_clean) == pytest.approx(2 * LN2)
    assert float(found.ce) == pytest.approx(LN2)
    assert float(found.same_top) == 0
    assert found.log_ratio is not None
    assert found.log_ratio.tolist() == pytest.approx([-LN2, LN2, 0], abs=1e-6)
    assert float(score(clean, changed, ~where, torch.tensor([0])).same_top) == 1


def test_scores_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, changed = torch.randn(2, 3, 7, 11, generator=generator) * 2
    clean[0, 0, 3] = changed[0, 0, 3] = -math.inf  # a token that the model never gives
    where = torch.rand(3, 7, generator=generator) > 0.4
    wanted = torch.randint(3, (int(where.sum()),), generator=generator)
    monkeypatch.setattr(scores_module, "_CHUNK_BYTES", 4 * 11 * 4)  # four rows at a time
    found = score(clean, changed, where, wanted, ratios=True)
    assert found.log_ratio is not None
    ratio = torch.zeros(11, dtype=torch.float64)
    for i, (c, p) in enumerate(where.nonzero().tolist()):
        log_p, log_q = (logits[c, p].double().log_softmax(-1) for logits in (clean, changed))
        kl = sum(float(a.exp() * (a - b)) for a, b in zip(log_p, log_q, strict=True) if a > -math.inf)
        assert float(found.kl[i]) == pytest.approx(kl, rel=1e-5)
        assert float(found.ce_clean[i]) == pytest.approx(-float(log_p[wanted[i]]), rel=1e-5)
        assert float(found.ce[i]) == pytest.approx(-float(log_q[wanted[i]]), rel=1e-5)
        assert float(found.same_top[i]) == float(int(log_p.argmax()) == int(log_q.argmax()))
        ratio += torch.where(log_p > -math.inf, log_q - log_p, 0)
    torch.testing.assert_close(found.log_ratio, ratio, rtol=1e-5, atol=1e-5)


def test_nothing_to_score_is_fine_and_nan_is_not() -> None:
    logits = torch.zeros(1, 2, 5)
    assert len(score(logits, logits, torch.zeros(1, 2, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)).kl) == 0
    broken = torch.full((1, 2, 5), math.nan)
    # only a wider type than the one in use is recomrepaired
    for dtype, message in (
        (torch.float16, r"not finite in float16.*evaluate\.lm\.dtype=bfloat16 or float32"),
        (torch.bfloat16, "not finite in bfloat16. A wider type does not help"),
        (torch.float32, "not finite in float32. A wider type does not help"),
    ):
        with pytest.raises(UserError, match=message):
            score(logits.to(dtype), broken.to(dtype), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0, 1]))


def sums_of(**columns_: list[float]) -> dict[str, torch.Tensor]:
    return {name.replace("_", "."): torch.tensor(values, dtype=torch.float64) for name, values in columns_.items()}


def test_recovered_by_hand() -> None:
    """Over 10 positions the losses are 3 clean, 3.5 spliced, 5 with zeros and 4 with the mean: 3/4 and 1/2."""
    sums = sums_of(n=[4, 6], clean_ce=[10, 20], zero_ce=[24, 26], mean_ce=[20, 20], x_ce=[13, 22])
    estimates = Estimates.of(sums, 0, 0)
    assert estimates.value(mean_of("clean.ce")) == 3
    assert estimates.value(increase("x")) == 0.5
    assert estimates.value(recovered("x", "zero")) == 0.75
    assert estimates.value(recovered("x", "mean")) == 0.5
    assert estimates.n_documents == 2
    assert estimates.interval(increase("x")) is None


@pytest.mark.parametrize("ablated", [3.0, 2.0])
def test_an_ablation_that_does_no_harm_leaves_nothing_to_recover(ablated: float) -> None:
    sums = sums_of(n=[1, 1], clean_ce=[3, 3], zero_ce=[ablated, ablated], x_ce=[3, 4])
    estimates = Estimates.of(sums, 50, 0)
    assert math.isnan(estimates.value(recovered("x", "zero")))
    assert estimates.interval(recovered("x", "zero")) is None
    assert estimates.interval(increase("x")) == (0, 1)


def test_intervals_are_of_drawn_documents() -> None:
    generator = torch.Generator().manual_seed(5)
    n = torch.tensor([3.0, 0, 5, 2, 4], dtype=torch.float64)  # the second document has no scored position
    ce = torch.rand(5, generator=generator, dtype=torch.float64) * n
    sums = {"n": n, "clean.ce": ce}
    found = Estimates.of(sums, 200, 9).interval(mean_of("clean.ce"))
    draws = torch.Generator().manual_seed(9)
    used = [0, 2, 3, 4]
    values = []
    for _ in range(200):
        drawn = [used[i] for i in torch.randint(4, (4,), generator=draws).tolist()]
        values.append(float(sum(ce[i] for i in drawn) / sum(n[i] for i in drawn)))
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert found == pytest.approx((float(low), float(high)))
    assert Estimates.of({"n": n[1:3], "clean.ce": ce[1:3]}, 200, 9).interval(mean_of("clean.ce")) is None


def test_columns_are_those_of_all_variants() -> None:
    found = columns((5, 14))
    assert len(set(found)) == len(found) == 2 + 2 * 3 + 2 * 4
    assert {"zero.ce", "mean.kl", "5.l0", "14.top1"} <= set(found)


def test_sums_of_documents_over_contexts_and_batches() -> None:
    """A document may span contexts and batches: against a loop over positions."""
    generator = torch.Generator().manual_seed(2)
    doc_ids = torch.tensor([[5, 5, 5, 9, 9], [9, 9, 9, 9, 2], [2, 2, 7, 7, 7]])
    scored = torch.rand(3, 5, generator=generator) < 0.7
    scored[2, 2:] = False  # document 7 has no scored position
    values = torch.rand(3, 5, generator=generator)
    sums = DocumentSums.empty(2)
    for rows in (slice(0, 1), slice(1, 3)):
        batch = Contexts((0,), torch.zeros(3, 5)[rows], doc_ids[rows], scored[rows], scored[rows])
        n = batch.per_document(torch.ones(int(scored[rows].sum())), scored[rows])
        sums.add(batch.documents(), torch.stack([n, batch.per_document(values[rows][scored[rows]], scored[rows])], 1))
    assert sums.documents.tolist() == [2, 5, 9]
    for document, (n, total) in zip((2, 5, 9), sums.rows.tolist(), strict=True):
        places = [(c, p) for c in range(3) for p in range(5) if scored[c, p] and doc_ids[c, p] == document]
        assert n == len(places) > 0
        assert total == pytest.approx(sum(float(values[place]) for place in places))
