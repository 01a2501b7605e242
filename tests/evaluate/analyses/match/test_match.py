"""Latent matching against dense correlations, a permuted copy that must be found, and shard sets of other layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from evaluate.analyses.match import match as matching_module
from evaluate.analyses.match.match import match
from evaluate.analyses.match.table import matching_table
from evaluate.config import EvaluateConfig
from evaluate.measures import pair_sums
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder


def settings(shards: ShardSet, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(shards=shards.path, device="cpu", batch_rows=17, **changes)


@pytest.fixture(params=[False, True], ids=["whole", "in small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(pair_sums, "BLOCK_BYTES", 8 * 21 * 5)
        monkeypatch.setattr(pair_sums, "PAIRS_AT_ONCE", 11)
        monkeypatch.setattr(matching_module, "_CELLS_AT_ONCE", 50)
        monkeypatch.setattr(matching_module, "_TILE_BYTES", 300)


@pytest.mark.usefixtures("blocks")
def test_against_dense_correlations(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    one, other = made.transcoder(seed=1), made.transcoder(seed=2, group_sizes=(4, 17))
    one.threshold[3] = 1e9
    runs = [str(made.run(tmp_path / name, transcoder)) for name, transcoder in (("a", one), ("b", other))]
    found = match(runs[0], runs[1], settings(val_set, tokens=60, out=tmp_path / "out"))
    assert found.n_rows == 60
    x = made.kept_rows(val_set, 60)["source"].float()
    acts = [transcoder.encode(x).double().numpy() for transcoder in (one, other)]
    table = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    assert [(row["side"], row["latent"]) for row in table] == [(0, i) for i in range(48)] + [(1, i) for i in range(21)]
    alive = [(a > 0).any(0) for a in acts]
    best = []
    for side, (own, across) in enumerate(((0, 1), (1, 0))):
        w_own, w_across = ((one, other)[i].W_dec.double().numpy() for i in (own, across))
        rows = [row for row in table if row["side"] == side]
        likes = []
        for row in rows:
            if not alive[own][row["latent"]]:
                assert (row["nearest"], row["like"], row["cosine"], row["correlation"]) == (None,) * 4
                likes.append(None)
                continue
            a = acts[own][:, row["latent"]]
            r = [np.corrcoef(a, b)[0, 1] if b.std() > 0 else -np.inf for b in acts[across].T]
            likes.append(int(np.argmax(r)))
            assert row["like"] == likes[-1]
            assert row["correlation"] == pytest.approx(max(r))
            cosine = np.where(alive[across], w_across @ w_own[row["latent"]], -np.inf)
            assert row["nearest"] == int(np.argmax(cosine))
            assert row["cosine"] == pytest.approx(cosine.max(), abs=1e-6)
        best.append(likes)
        summary = found.sides[side].total
        kept = [row for row in rows if row["like"] is not None]
        assert (summary.n_latents, summary.n_alive) == (len(rows), len(kept))
        assert summary.mean_max_correlation == pytest.approx(np.mean([row["correlation"] for row in kept]))
        assert summary.mean_max_cosine == pytest.approx(np.mean([row["cosine"] for row in kept]))
        assert summary.share_close_cosine == pytest.approx(np.mean([row["cosine"] >= 0.7 for row in kept]))
        assert summary.share_close_correlation == pytest.approx(np.mean([row["correlation"] >= 0.7 for row in kept]))
    for side, (own, across) in enumerate(((0, 1), (1, 0))):
        pairs = [(i, j) for i, j in enumerate(best[own]) if j is not None]
        mutual = np.mean([best[across][j] == i for i, j in pairs])
        assert 0 < mutual < 1
        assert found.sides[side].total.share_mutual == pytest.approx(mutual)
    assert [group.n_latents for group in found.sides[1].groups] == [4, 17]
    assert json.loads((tmp_path / "out" / "matching.json").read_text()) == found.model_dump(mode="json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["matches.parquet", "matching.json"]
    assert matching_table(found).row_count == 4 + 3


def test_a_permuted_copy_is_found(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    one = made.transcoder()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    other = Transcoder(one.config)
    weights = dict(one.named_parameters())
    cut = {name: weights[name][order] for name in ("b_enc", "W_dec", "threshold")}
    other.set_weights({**weights, **cut, "W_enc": weights["W_enc"][:, order]})
    runs = [str(made.run(tmp_path / name, transcoder)) for name, transcoder in (("a", one), ("b", other))]
    found = match(runs[0], runs[1], settings(val_set, out=tmp_path / "out"))
    for side in found.sides:
        numbers = side.total
        assert (numbers.mean_max_cosine, numbers.mean_max_correlation) == pytest.approx((1, 1))
        assert (numbers.share_mutual, numbers.share_close_cosine) == (1.0, 1.0)
    table = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    for row in table:
        if row["side"] == 1 and row["like"] is not None:
            assert row["like"] == row["nearest"] == int(order[row["latent"]])
    again = match(runs[0], runs[1], settings(val_set))
    assert again == found


def test_a_prefix_is_in_its_whole(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = str(made.run(tmp_path / "a", made.transcoder()))
    found = match(run, f"{run}@2", settings(val_set))
    assert [side.name for side in found.sides] == ["a", "a@2"]
    assert found.sides[1].total.mean_max_correlation == pytest.approx(1)
    assert found.sides[0].groups[0].share_mutual == found.sides[0].groups[1].share_mutual == 1.0
    assert (found.sides[0].groups[2].mean_max_correlation or 0) < 0.9


def test_other_layers_need_the_same_text(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    """The second set has the same tokens and other activations; the third has other tokens."""
    run = str(made.run(tmp_path / "a", made.transcoder()))
    twin = made.shards(tmp_path / "twin", source=lambda x: -x)
    found = match(run, run, settings(val_set), other_shards=twin.path)
    assert found.n_rows == len(made.kept_rows(val_set)["token"])
    assert (found.sides[0].total.mean_max_correlation or 1) < 0.9
    assert found.sides[0].total.mean_max_cosine == pytest.approx(1)
    strange = made.shards(tmp_path / "strange", seed=8)
    with pytest.raises(UserError, match="do not hold the same tokens in the same order"):
        match(run, run, settings(val_set), other_shards=strange.path)


def test_the_shard_set_is_that_of_the_runs(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    one, two = (str(made.run(tmp_path / name, made.transcoder(seed=7), shards=val_set)) for name in ("one", "two"))
    bare = str(made.run(tmp_path / "bare", made.transcoder(seed=7)))
    unnamed = settings(val_set).model_copy(update={"shards": None})
    expected = match(one, two, settings(val_set))
    for pair in ((one, two), (one, bare), (bare, one)):
        assert match(*pair, unnamed).shard_set_digests == expected.shard_set_digests
    with pytest.raises(UserError, match="no shard set was named, and none of"):
        match(bare, bare, unnamed)
    # Two harvests of one layer hold other text: both are run on the first one's.
    again = made.shards(tmp_path / "l1", seed=3)
    other = str(made.run(tmp_path / "other", made.transcoder(seed=8), shards=again))
    assert match(one, other, unnamed).shard_set_digests == (val_set.digest,) * 2


def test_refusals(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = str(made.run(tmp_path / "a", made.transcoder()))
    with pytest.raises(UserError, match="pass --shards"):
        match(run, run, EvaluateConfig())
    with pytest.raises(UserError, match="as data/runs/l17-k96@2 for the first two groups"):
        match(run, run, settings(val_set, prefix=1))
