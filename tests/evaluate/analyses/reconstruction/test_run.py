"""The whole evaluation over a shard set on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.analyses.reconstruction.result import Report
from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analyses.reconstruction.table import prefix_table
from evaluate.analysis import Silent, answer
from evaluate.config import EvaluateConfig
from evaluate.measures.records import CurvePoint
from evaluate.rows.batches import row_batches
from matryoshka.config import load_config
from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet


def settings(shards: ShardSet, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(shards=shards.path, device="cpu", **changes)


@pytest.mark.parametrize("convention", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("tokens", [None, 40])
def test_report_against_a_dense_twin(
    val_set: ShardSet, made: Any, tmp_path: Path, convention: str, tokens: int | None
) -> None:
    transcoder = made.transcoder(input=convention)
    run = made.run(tmp_path / "run", transcoder)
    (evaluation,) = answer(RunAnalysis(), [run], settings(val_set, tokens=tokens))
    report = evaluation.result
    rows = made.kept_rows(val_set, tokens)
    x = apply_convention(rows["source"], convention, source_site="resid_mid", norm=made.norm())
    y = rows["target"].double().numpy()
    acts = transcoder.encode(x)
    assert report.n_rows == len(y) == (tokens or len(y))
    for prefix, y_hat in zip(report.threshold, transcoder.nested(acts), strict=True):
        fvu = ((y - y_hat.double().numpy()) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert prefix.fvu == pytest.approx(fvu, rel=1e-5)
        assert prefix.l0 == pytest.approx(float((acts[:, : prefix.prefix_end] > 0).sum()) / len(y))
    dead = (acts > 0).sum(0) == 0
    assert report.total.n_dead == int(dead.sum())
    assert [group.n_dead for group in report.groups] == [int(part.sum()) for part in dead.split(made.group_sizes)]


def test_batch_topk_and_curve_and_spread_against_a_dense_twin(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder()
    run = made.run(tmp_path / "run", transcoder, batch_tokens=17)
    config = settings(val_set, curve_tokens=30, curve_scales=(1.5, 0.4), bootstrap=50)
    (evaluation,) = answer(RunAnalysis(), [run], config)
    report = evaluation.result
    assert report.batch_topk is not None
    sq_err, l0, y_all, curve_sq_err, curve_y = torch.zeros(3).double(), torch.zeros(3), [], torch.zeros(3).double(), []
    step, n_seen = -(-report.n_rows // 30), 0
    assert step == 3
    for batch in row_batches(val_set.val, 17):
        x, y = batch.source.float(), batch.target.float()
        pre_acts = transcoder.pre_acts(x)
        cut = pre_acts.flatten().sort(descending=True).values[9 * len(x) - 1]
        acts = torch.where(pre_acts >= cut, pre_acts, 0.0).relu()
        for i, y_hat in enumerate(transcoder.nested(acts)):
            sq_err[i] += (y_hat - y).double().square().sum()
            l0[i] += (acts[:, : transcoder.prefix_ends[i]] > 0).sum()
        y_all.append(y.double())
        # the curve takes every third row, whichever batch it is in
        chosen = [r for r in range(len(x)) if (n_seen + r) % step == 0]
        n_seen += len(x)
        acts = torch.where(pre_acts > 0.4 * transcoder.threshold, pre_acts, 0.0).relu()[chosen]
        nested = transcoder.nested(acts)
        curve_sq_err += torch.stack([(y_hat - y[chosen]).double().square().sum() for y_hat in nested])
        curve_y.append(y[chosen].double())
    for got, errors, targets in ((report.batch_topk, sq_err, y_all), (report.curve[1], curve_sq_err, curve_y)):
        y = torch.cat(targets)
        twin = (errors / (y - y.mean(0)).square().sum()).tolist()
        fvu = got.fvu if isinstance(got, CurvePoint) else [prefix.fvu for prefix in got]
        assert fvu == pytest.approx(twin, rel=1e-5)
    assert [prefix.l0 for prefix in report.batch_topk] == pytest.approx((l0 / report.n_rows).tolist())
    assert report.batch_topk[-1].l0 == pytest.approx(9)
    rows = made.kept_rows(val_set)
    active = (transcoder.encode(rows["source"].float()) > 0).cumsum(1)[:, [end - 1 for end in transcoder.prefix_ends]]
    levels = report.spread.quantile_levels
    twin = np.quantile(active.numpy(), levels, axis=0, method="inverted_cdf").T
    assert np.array(report.spread.l0_quantiles).tolist() == twin.tolist()
    assert report.spread.fvu_interval is not None
    for (low, high), prefix in zip(report.spread.fvu_interval, report.threshold, strict=True):
        assert prefix.fvu is not None
        assert low < prefix.fvu < high


@pytest.mark.parametrize("batch_rows", [1, 13, 1000])
def test_batch_rows_changes_no_number(val_set: ShardSet, made: Any, tmp_path: Path, batch_rows: int) -> None:
    run = made.run(tmp_path / "run", made.transcoder(), batch_tokens=17)
    (first,) = answer(RunAnalysis(), [run], settings(val_set, bootstrap=30))
    content = first.path.read_bytes()
    table = first.path.with_name("latents.parquet").read_bytes()
    assert (first.result.batch_topk_rows, first.result.batch_topk_as_trained) == (17, True)
    (again,) = answer(RunAnalysis(), [run], settings(val_set, bootstrap=30, batch_rows=batch_rows))
    assert not again.is_new
    first.path.unlink()
    (other,) = answer(RunAnalysis(), [run], settings(val_set, bootstrap=30, batch_rows=batch_rows))
    assert other.is_new
    assert other.path.read_bytes() == content
    assert other.path.with_name("latents.parquet").read_bytes() == table
    assert "BatchTopK in batches of 17 rows (those of training)" in prefix_table(other.result).caption


@pytest.mark.parametrize(
    "record", [None, {"config": {}}, {"config": {"batch_tokens": True}}, {"config": {"batch_tokens": -3}}]
)
def test_a_batch_of_training_that_is_not_known(
    val_set: ShardSet, made: Any, tmp_path: Path, record: dict[str, Any] | None
) -> None:
    made.transcoder().save(tmp_path / "bare")
    if record is not None:
        (tmp_path / "bare" / "run.json").write_text(json.dumps({"format_version": 1, **record}))
    (found,) = answer(RunAnalysis(), [tmp_path / "bare"], settings(val_set, bootstrap=30))
    assert (found.result.batch_topk_rows, found.result.batch_topk_as_trained) == (4096, False)
    assert "batches of 4,096 rows (those of training are not known)" in prefix_table(found.result).caption


def test_a_named_checkpoint_has_the_batch_of_its_run(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder(), batch_tokens=17)
    config = settings(val_set, bootstrap=0, out=tmp_path / "out")
    (found,) = answer(RunAnalysis(), [run / "checkpoints" / "step-000400"], config)
    assert (found.result.batch_topk_rows, found.result.batch_topk_as_trained) == (17, True)


def test_latents_parquet(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    transcoder = made.transcoder()
    transcoder.threshold[7] = 1e9
    run = made.run(tmp_path / "run", transcoder)
    (evaluation,) = answer(RunAnalysis(), [run], settings(val_set))
    path = evaluation.path.with_name("latents.parquet")
    content = path.read_bytes()
    table = pq.read_table(path)
    acts = transcoder.encode(made.kept_rows(val_set)["source"].float())
    assert table["latent"].to_pylist() == list(range(48))
    assert table["group"].to_pylist() == [1] * 6 + [2] * 11 + [3] * 31
    assert table["n_rows"].to_pylist() == (acts > 0).sum(0).tolist()
    assert table["density"].to_pylist() == pytest.approx((acts > 0).double().mean(0).tolist())
    assert table["max_act"].to_pylist()[8] == pytest.approx(float(acts[:, 8].max()), rel=1e-6)
    assert (table["mean_act"].to_pylist()[7], table["max_act"].to_pylist()[7]) == (None, None)
    assert table["W_dec_norm"].to_pylist() == pytest.approx([1.0] * 48, rel=1e-5)
    assert table["enc_dec_cosine"].null_count == 48  # the widths differ
    path.unlink()
    (again,) = answer(RunAnalysis(), [run], settings(val_set))
    assert again.is_new
    assert path.read_bytes() == content


def test_a_planted_transcoder_explains_everything(made: Any, tmp_path: Path) -> None:
    # Integer weights and inputs: exact in bfloat16, so that nothing is left over.
    planted = made.transcoder(group_sizes=(24,), k=9)
    w_dec = torch.randint(-2, 3, (24, made.d_out), generator=torch.Generator().manual_seed(1)).float()
    weights = {
        "W_enc": torch.cat([torch.eye(12), -torch.eye(12)], 1),
        "b_enc": torch.zeros(24),
        "W_dec": w_dec,
        "b_dec": torch.ones(made.d_out),
        "threshold": torch.zeros(24),
    }
    planted.set_weights(weights)
    shards = made.shards(
        tmp_path / "l1",
        source=lambda x: x.round().clamp(-2, 2),
        target=lambda x: planted(x.flatten(0, -2)).view(*x.shape[:-1], -1),
    )
    planted.save(tmp_path / "planted")
    (evaluation,) = answer(RunAnalysis(), [tmp_path / "planted"], settings(shards))
    (prefix,) = evaluation.result.threshold
    assert (prefix.fvu, prefix.norm_ratio) == (0.0, 1.0)
    rows = made.kept_rows(shards)
    assert prefix.l0 == pytest.approx(float((rows["source"] != 0).sum(1).double().mean()))


def test_twice_gives_the_same_bytes_and_no_second_pass(
    val_set: ShardSet, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    (first,) = answer(RunAnalysis(), [run], settings(val_set))
    content = first.path.read_bytes()
    assert first.path == run / "eval" / f"l1-{val_set.digest[:8]}" / "report.json"

    passes: list[str] = []
    silent = Silent()
    monkeypatch.setattr(silent, "started", lambda name, _: passes.append(name))
    (again,) = answer(RunAnalysis(), [run], settings(val_set), silent)
    assert passes == []
    assert (first.is_new, again.is_new) == (True, False)
    assert again.result == first.result
    first.path.unlink()
    (third,) = answer(RunAnalysis(), [run], settings(val_set), silent)
    assert passes == ["run"]
    assert third.path.read_bytes() == content
    assert str(tmp_path).encode() not in content


def test_the_report_moves_on_with_the_run(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder(), steps=(100,))
    answer(RunAnalysis(), [run], settings(val_set))
    made.run(run, made.transcoder(seed=5), steps=(100, 200))
    (second,) = answer(RunAnalysis(), [run], settings(val_set, tokens=20))
    assert second.is_new
    assert second.result.transcoder.step == 200
    text = " ".join(second.replaced)
    assert "transcoder.step: 100 -> 200" in text
    assert "settings.tokens: null -> 20" in text


def test_an_unreadable_report_is_made_anew(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    (first,) = answer(RunAnalysis(), [run], settings(val_set))
    content = first.path.read_bytes()
    first.path.write_bytes(content[:100])
    (second,) = answer(RunAnalysis(), [run], settings(val_set))
    assert second.is_new
    assert second.path.read_bytes() == content


def test_the_report_is_a_versioned_json_object(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    (evaluation,) = answer(RunAnalysis(), [run], settings(val_set, out=tmp_path / "there"))
    content = json.loads((tmp_path / "there" / "report.json").read_text())
    assert content["format_version"] == 1
    assert content["transcoder"]["sha256"] == evaluation.checkpoint.sha256
    assert content["shard_set"]["digest"] == val_set.digest
    assert content["settings"]["tokens"] is None
    assert Report.model_validate(content) == evaluation.result
    assert np.isfinite([prefix["fvu"] for prefix in content["threshold"]]).all()


def test_several_runs_and_places(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    runs = [made.run(tmp_path / name / "run", made.transcoder(seed=i)) for i, name in enumerate("ab")]
    one, two = answer(RunAnalysis(), runs, settings(val_set))
    assert one.result.threshold != two.result.threshold
    with pytest.raises(UserError, match="same name"):
        answer(RunAnalysis(), runs, settings(val_set, out=tmp_path / "out"))


def test_refusals(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder(d_out=11))
    with pytest.raises(UserError, match="pass --shards"):
        answer(RunAnalysis(), [run], EvaluateConfig())
    with pytest.raises(UserError, match="target width 11 against 10"):
        answer(RunAnalysis(), [run], settings(val_set))
    assert not (run / "eval").exists()
    with pytest.raises(UserError, match="not a shard set"):
        answer(RunAnalysis(), [run], EvaluateConfig(shards=tmp_path / "none"))
    with pytest.raises(UserError, match="unknown key"):
        load_config(EvaluateConfig, "evaluate", overrides=["evaluate.token=5"])
    with pytest.raises(UserError, match="largest to the smallest"):
        load_config(EvaluateConfig, "evaluate", overrides=["evaluate.curve_scales=[0.5, 1.0]"])
    with pytest.raises(UserError, match="own threshold"):
        load_config(EvaluateConfig, "evaluate", overrides=["evaluate.compare.scales=[2.0, 0.5]"])


def test_train_rows_only_when_asked_for_and_never_as_the_report(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder()
    run = made.run(tmp_path / "run", transcoder)
    (held_out,) = answer(RunAnalysis(), [run], settings(val_set))
    content = held_out.path.read_bytes()
    (seen,) = answer(RunAnalysis(), [run], settings(val_set, split="train"))
    assert held_out.path.read_bytes() == content
    assert seen.path == held_out.path.parent / "train" / "report.json"
    assert (held_out.result.shard_set.split, seen.result.shard_set.split) == ("val", "train")
    assert "TRAIN rows" in str(prefix_table(seen.result).title)
    rows = [(shard, val_set.train.keep(shard)) for shard in range(val_set.train.n_shards)]
    x = torch.cat([val_set.train.activations("source", shard)[keep] for shard, keep in rows]).float()
    y = torch.cat([val_set.train.activations("target", shard)[keep] for shard, keep in rows]).double()
    assert seen.result.n_rows == len(x)
    for prefix, y_hat in zip(seen.result.threshold, transcoder.nested(transcoder.encode(x)), strict=True):
        fvu = (y_hat.double() - y).square().sum() / (y - y.mean(0)).square().sum()
        assert prefix.fvu == pytest.approx(float(fvu), rel=1e-5)
    assert sum(stratum.n_rows for stratum in seen.result.by_token_frequency) == len(x)
    assert "not in train" not in {stratum.name for stratum in seen.result.by_token_frequency}


def test_a_prefix_alone_is_the_prefix_of_the_whole(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    (whole,) = answer(RunAnalysis(), [run], settings(val_set))
    (alone,) = answer(RunAnalysis(), [run], settings(val_set, prefix=2))
    assert alone.path == whole.path.parent / "prefix-2" / "report.json"
    assert alone.result.threshold == whole.result.threshold[:2]
    assert alone.result.by_position[0].fvu == whole.result.by_position[0].fvu[:2]
    # It was trained with the k of the whole, and has none of its own.
    assert alone.result.batch_topk is None
    assert alone.result.total.n_latents == 17
    assert "its first 2 groups alone" in str(prefix_table(alone.result).title)
    with pytest.raises(UserError, match="no prefix 4: this transcoder has 3"):
        answer(RunAnalysis(), [run], settings(val_set, prefix=4))
