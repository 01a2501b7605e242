"""Comparison at equal L0: interpolation by hand, curves against moved thresholds, pairing of the draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.analyses.compare.compare import compare
from evaluate.analyses.compare.matched import fvu_at
from evaluate.analyses.compare.table import comparison_table
from evaluate.config import CompareConfig, EvaluateConfig
from evaluate.subject.subjects import load_subject
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet


def settings(shards: ShardSet, l0: tuple[float, ...] | None = None, **changes: Any) -> EvaluateConfig:
    content = CompareConfig(scales=(3.0, 1.5, 1.0, 0.5, 0.1), l0=l0)
    return EvaluateConfig(shards=shards.path, device="cpu", batch_rows=17, bootstrap=40, compare=content, **changes)


def test_interpolation_by_hand() -> None:
    l0 = torch.tensor([[1.0, 10.0, 10.0, 100.0]], dtype=torch.float64)
    fvu = torch.tensor([[0.9, 0.5, 0.5, 0.1]], dtype=torch.float64)
    # half-way in log L0 between 10 and 100 is sqrt(1000)
    for target, value in ((1.0, 0.9), (10.0, 0.5), (math.sqrt(1000), 0.3), (100.0, 0.1), (math.sqrt(10), 0.7)):
        assert float(fvu_at(l0, fvu, target)[0]) == pytest.approx(value)
    for target in (0.99, 100.1):
        assert math.isnan(float(fvu_at(l0, fvu, target)[0]))


def test_a_point_without_activations_is_not_interpolated_from() -> None:
    l0 = torch.tensor([[0.0, 0.0, 5.0, 20.0]], dtype=torch.float64)
    fvu = torch.tensor([[1.0, 1.0, 0.5, 0.3]], dtype=torch.float64)
    assert math.isnan(float(fvu_at(l0, fvu, 2.0)[0]))
    assert float(fvu_at(l0, fvu, 5.0)[0]) == 0.5
    assert float(fvu_at(l0, fvu, 10.0)[0]) == pytest.approx(0.4)


def test_rows_of_draws_are_interpolated_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    l0 = torch.rand(9, 4, generator=generator, dtype=torch.float64).cumsum(1) + 0.1
    fvu = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    together = fvu_at(l0, fvu, 1.3)
    for draw in range(9):
        torch.testing.assert_close(together[draw], fvu_at(l0[[draw]], fvu[[draw]], 1.3)[0], equal_nan=True)


def test_two_runs(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    first = made.run(tmp_path / "a", made.transcoder(seed=1))
    other = made.transcoder(seed=2, input="normalized")
    second = made.run(tmp_path / "b", other)
    result = compare([str(first), str(second)], settings(val_set, out=tmp_path / "out"))
    one, two = result.entries
    assert [entry.name for entry in result.entries] == ["a", "b"]
    assert one.matched[0].l0 == pytest.approx(one.l0)
    assert one.matched[0].fvu == pytest.approx(one.fvu)
    assert (one.matched[0].difference, one.matched[0].difference_interval) == (0.0, (0.0, 0.0))
    assert two.matched[0].difference == pytest.approx((two.matched[0].fvu or 0) - (one.matched[0].fvu or 0))
    low, high = two.matched[0].difference_interval or (0, 0)
    assert low < (two.matched[0].difference or 0) < high
    # each point of the second one's curve, with its own input and thresholds really moved
    rows = made.kept_rows(val_set)
    x, y = made.norm().normalized(rows["source"]), rows["target"].double()
    threshold = other.threshold.clone()
    for point in two.curve:
        other.threshold.copy_(threshold * point.threshold_scale)
        acts = other.encode(x)
        fvu = (y - other.decode(acts).double()).square().sum() / (y - y.mean(0)).square().sum()
        assert point.fvu[0] == pytest.approx(float(fvu), rel=1e-5)
        assert point.l0[0] == pytest.approx(float((acts > 0).sum(1).double().mean()))
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content == result.model_dump(mode="json")
    again = compare([str(first), str(second)], settings(val_set))
    assert again.entries == result.entries


def test_no_extrapolation(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    runs = [str(made.run(tmp_path / name, made.transcoder(seed=seed))) for seed, name in enumerate("ab")]
    result = compare(runs, settings(val_set, l0=(0.001, 15.0, 47.9), tokens=50))
    for entry in result.entries:
        assert [matched.fvu is None for matched in entry.matched] == [True, False, True]
        assert entry.matched[2].fvu_interval is None
    assert result.n_rows == 50
    table = comparison_table(result)
    assert table.row_count == 6


def test_a_prefix_is_the_transcoder_of_its_latents(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder(skip=True)
    run = made.run(tmp_path / "a", transcoder)
    subject = load_subject(f"{run}@2", val_set)
    assert subject.name == "a@2"
    x = torch.randn(9, made.d_in, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(subject.transcoder(x), transcoder(x, 2))
    with pytest.raises(
        UserError,
        match=r"there is no prefix 17: this transcoder has 3 nested groups, 1 \(6 latents\), 2 \(17 latents\)",
    ):
        load_subject(f"{run}@17", val_set)


def test_refusals(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = str(made.run(tmp_path / "a", made.transcoder()))
    with pytest.raises(UserError, match="two transcoders or more"):
        compare([run], settings(val_set))
    with pytest.raises(UserError, match="same name"):
        compare([run, run], settings(val_set))
    with pytest.raises(UserError, match="pass --shards"):
        compare([run, run], EvaluateConfig())
    with pytest.raises(UserError, match="not a folder"):
        compare([run, str(tmp_path / "none")], settings(val_set))


def test_the_shard_set_is_that_of_the_runs(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    one, two = (str(made.run(tmp_path / name, made.transcoder(seed=7), shards=val_set)) for name in ("one", "two"))
    bare = str(made.run(tmp_path / "bare", made.transcoder()))
    unnamed = settings(val_set).model_copy(update={"shards": None})
    expected = compare([one, f"{bare}@2"], settings(val_set))
    assert compare([one, f"{bare}@2"], unnamed) == expected
    assert compare([bare, f"{two}@2"], unnamed).shard_set_digest == val_set.digest
    other = made.shards(tmp_path / "l2", seed=5)
    strange = str(made.run(tmp_path / "strange", made.transcoder(), shards=other))
    with pytest.raises(UserError, match=r"several shard sets \(.*l1, .*l2\); name the one to measure all of them on"):
        compare([one, strange], unnamed)
    with pytest.raises(UserError, match="no shard set was named, and none of"):
        compare([bare, f"{bare}@2"], unnamed)


def test_train_rows_are_named_in_the_table(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    runs = [str(made.run(tmp_path / name, made.transcoder(seed=seed))) for seed, name in enumerate("ab")]
    held_out = compare(runs, settings(val_set))
    seen = compare(runs, settings(val_set, split="train"))
    assert (held_out.split, seen.split) == ("val", "train")
    assert seen.n_rows == sum(int(val_set.train.keep(shard).sum()) for shard in range(2))
    assert "TRAIN rows" in str(comparison_table(seen).title)
    assert "held-out rows" in str(comparison_table(held_out).title)
    with pytest.raises(UserError, match="named with its run"):
        compare(runs, settings(val_set, prefix=1))
