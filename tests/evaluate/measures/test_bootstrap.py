"""Intervals over documents, against loops over rows; and the captions about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.analyses.compare.compare import compare
from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analysis import answer
from evaluate.config import CompareConfig, EvaluateConfig
from evaluate.measures.bootstrap import central, resampled
from evaluate.rows.batches import documents_of
from evaluate.tables import over_documents
from matryoshka.shards import ShardSet


@pytest.fixture(scope="module")
def long_documents(made: Any, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Documents of 19 positions in contexts of 8: each spans contexts, and one spans two shards."""
    return made.shards(tmp_path_factory.mktemp("long") / "l1", doc_len=19)


def draws_of(n_units: int, n_draws: int, seed: int) -> list[list[int]]:
    """The units of each draw, by the plain use of a generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(n_units, (n_units,), generator=generator).tolist() for _ in range(n_draws)]


def test_draws_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = torch.stack([sums[units].sum(0) for units in draws_of(7, 50, 4)])
    whole = resampled(sums, 50, torch.Generator().manual_seed(4))
    assert whole is not None
    torch.testing.assert_close(whole, twin)
    # However few units are drawn at once, down to one draw at a time.
    for at_once in (3, 15):
        monkeypatch.setattr("evaluate.measures.bootstrap._DRAWN_AT_ONCE", at_once)
        torch.testing.assert_close(resampled(sums, 50, torch.Generator().manual_seed(4)), whole)
    low_high = np.quantile(twin.numpy(), [0.025, 0.975], axis=0).T
    assert np.array(central(whole)) == pytest.approx(low_high)
    assert resampled(sums, 0, torch.Generator()) is None
    assert resampled(sums[:1], 50, torch.Generator()) is None


@pytest.mark.parametrize("limit", [None, 41])
def test_documents_are_those_of_the_rows(long_documents: ShardSet, made: Any, limit: int | None) -> None:
    rows = made.kept_rows(long_documents, limit)
    found = documents_of(long_documents.val, limit)
    assert found.tolist() == sorted(set(rows["doc"].tolist()))
    shards = [set(long_documents.val.doc_ids(shard).flatten().tolist()) for shard in range(3)]
    assert shards[0] & shards[1], "a document goes on in the next shard"
    assert len(found) == (3 if limit else 6)


@pytest.mark.parametrize("tokens", [None, 41])
def test_a_report_draws_documents(long_documents: ShardSet, made: Any, tmp_path: Path, tokens: int | None) -> None:
    transcoder = made.transcoder()
    run = made.run(tmp_path / "run", transcoder)
    config = EvaluateConfig(shards=long_documents.path, device="cpu", bootstrap=60, seed=3, tokens=tokens)
    (found,) = answer(RunAnalysis(), [run], config)
    report = found.result
    rows = made.kept_rows(long_documents, tokens)
    y = rows["target"].double()
    documents = sorted(set(rows["doc"].tolist()))
    assert report.n_documents == len(documents)
    deviation = (y - y.mean(0)).square().sum(1)
    acts = transcoder.encode(rows["source"].float())
    for place, y_hat in enumerate(transcoder.nested(acts)):
        error, active = (y_hat.double() - y).square().sum(1), (acts[:, : transcoder.prefix_ends[place]] > 0).sum(1)
        fvu, l0 = [], []
        for drawn in draws_of(len(documents), 60, 3):
            members = torch.cat([(rows["doc"] == documents[unit]).nonzero().flatten() for unit in drawn])
            fvu.append(float(error[members].sum() / deviation[members].sum()))
            l0.append(float(active[members].double().mean()))
        for interval, values in ((report.spread.fvu_interval, fvu), (report.spread.l0_interval, l0)):
            assert interval is not None
            assert interval[place] == pytest.approx(np.quantile(values, [0.025, 0.975]), rel=1e-5)


def test_a_comparison_draws_documents(long_documents: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder()
    runs = [str(made.run(tmp_path / "a", transcoder)), str(made.run(tmp_path / "b", made.transcoder(seed=1)))]
    scales = CompareConfig(scales=(1.5, 1.0, 0.5))
    config = EvaluateConfig(shards=long_documents.path, device="cpu", bootstrap=40, seed=5, compare=scales)
    found = compare(runs, config)
    rows = made.kept_rows(long_documents)
    documents = sorted(set(rows["doc"].tolist()))
    assert found.n_documents == len(documents) == 6
    y = rows["target"].double()
    deviation = (y - y.mean(0)).square().sum(1)
    curve = []
    threshold = transcoder.threshold.clone()
    for scale in scales.scales:
        transcoder.threshold.copy_(threshold * scale)
        acts = transcoder.encode(rows["source"].float())
        curve.append(((transcoder.decode(acts).double() - y).square().sum(1), (acts > 0).sum(1).double()))
    # At the first one's own L0, by hand: linear in log L0 between the neighbours.
    target, values = found.entries[0].l0, []
    for drawn in draws_of(6, 40, 5):
        members = torch.cat([(rows["doc"] == documents[unit]).nonzero().flatten() for unit in drawn])
        fvu = [float(error[members].sum() / deviation[members].sum()) for error, _ in curve]
        l0 = [float(active[members].mean()) for _, active in curve]
        values.append(float(np.interp(np.log(target), np.log(l0), fvu)))
        assert l0[0] < target < l0[-1]
    assert found.entries[0].matched[0].fvu_interval == pytest.approx(np.quantile(values, [0.025, 0.975]), rel=1e-5)


def test_one_document_has_no_interval(made: Any, tmp_path: Path) -> None:
    shards = made.shards(tmp_path / "l1", doc_len=1000)
    run = made.run(tmp_path / "run", made.transcoder())
    (found,) = answer(RunAnalysis(), [run], EvaluateConfig(shards=shards.path, device="cpu", bootstrap=30))
    assert (found.result.n_documents, found.result.spread.fvu_interval) == (1, None)


def test_captions_state_the_number_of_documents() -> None:
    assert over_documents(1234) == "over 1,234 documents"
    assert over_documents(20) == "over 20 documents"
    assert over_documents(19) == "over 19 documents (few documents)"
    assert over_documents(9, 40) == "over 9 to 40 documents (few documents)"
    assert over_documents(40, None).startswith("over contexts, so too narrow")


def test_a_report_that_drew_contexts_is_read_and_made_anew(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    config = EvaluateConfig(shards=val_set.path, device="cpu", bootstrap=30)
    (first,) = answer(RunAnalysis(), [run], config)
    content = first.result.model_dump(mode="json")
    del content["n_documents"], content["settings"]["bootstrap_unit"]
    older = type(first.result).model_validate(content)
    older.publish(first.path, first.path.parent)
    assert RunAnalysis.result.read(first.path.parent) == older
    (again,) = answer(RunAnalysis(), [run], config)
    assert again.replaced == ('settings.bootstrap_unit: null -> "document"',)
    assert again.result == first.result
