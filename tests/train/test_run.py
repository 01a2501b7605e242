"""Whole runs on small sets: exact resume, refusals, planted structure recovered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import train.member as module
from matryoshka.errors import UserError
from matryoshka.metrics import FvuSums
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder
from train.batches.set_aside import SetAside
from train.batches.stream import ORDER
from train.config import TrainConfig
from train.result import TrainResult
from train.run import train
from train.step.step import StepReport


def config_of(settings: dict[str, Any], out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings | {"out": out} | changes)


def final(result: TrainResult) -> Transcoder:
    assert result.checkpoint is not None
    return Transcoder.load(result.checkpoint)


def val_fvu(transcoder: Transcoder, shards: ShardSet) -> list[float]:
    sums = FvuSums()
    for block in shards.val.blocks():
        source, target = block.rows()
        x = apply_convention(source, transcoder.config.input, source_site="resid_mid", norm=shards.norm)
        nested = transcoder.nested(transcoder.encode(x), x=x)
        sums.add(target.float(), torch.stack([(y_hat - target.float()).square().sum(1) for y_hat in nested]))
    return sums.value()


class StopAfter:
    """A kill at a given step, as far as the files can tell."""

    def __init__(self, step: int) -> None:
        self.step = step

    def started(self, entries: object, first_steps: object) -> None:
        pass

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:  # noqa: ARG002
        if step == self.step:
            raise KeyboardInterrupt

    def ended(self, name: str, outcome: str) -> None:
        pass


@pytest.mark.parametrize("killed_after", [1, 7, 13, 23])
def test_resumed_equals_uninterrupted(run_settings: dict[str, Any], tmp_path: Path, killed_after: int) -> None:
    whole = train(config_of(run_settings, tmp_path / "whole"))
    config = config_of(run_settings, tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        train(config, StopAfter(killed_after))
    resumed = train(config)
    assert whole.checkpoint is not None
    assert resumed.checkpoint is not None
    for name in ("transcoder.safetensors", "optimizer.safetensors", "config.json", "state.json"):
        assert (whole.checkpoint / name).read_bytes() == (resumed.checkpoint / name).read_bytes(), name
    metrics = [(path / "metrics.jsonl").read_bytes() for path in (whole.path, resumed.path)]
    assert metrics[0] == metrics[1]
    assert [json.loads(line)["step"] for line in metrics[0].splitlines()] == [3, 6, 9, 12, 15, 18, 21, 24]


def test_a_finished_run_is_left_alone_and_other_settings_refused(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(run_settings, tmp_path / "run", steps=5)
    first = train(config)
    assert first.n_steps_taken == 5
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    assert train(config).n_steps_taken == 0
    with pytest.raises(UserError, match=r"plan\.lr: 0\.003 -> 0\.1"):
        train(config_of(run_settings, tmp_path / "run", steps=5, lr=0.1))
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == before


def test_a_run_over_batches_of_another_order_is_refused(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(run_settings, tmp_path / "run")
    train(config)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    assert record["identity"].pop("order") == ORDER  # as before there was one
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"order: .* -> {ORDER}"):
        train(config)


def test_a_folder_with_something_else_is_refused(run_settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and not a run"):
        train(config_of(run_settings, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(module.TrainStep):
        def __call__(self, x: Tensor, y: Tensor, *, lr: float, log: bool = False) -> StepReport | None:
            if int(self.state.step) == 10:
                x = x.clone()
                x[3, 2] = float("nan")
            return super().__call__(x, y, lr=lr, log=log)

    monkeypatch.setattr(module, "TrainStep", Poisoned)
    with pytest.raises(UserError, match=r"stopped before step 11.*step-000007.*smaller --lr"):
        train(config_of(run_settings, tmp_path / "run"))
    assert [c.step for c in module.list_checkpoints(tmp_path / "run")] == [7]


def test_a_batch_that_a_gpu_skipped_is_in_no_checkpoint(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the host learns of a bad batch when it asks: before it writes what it takes for the step after it."""

    class Poisoned(module.TrainStep):
        def __call__(self, x: Tensor, y: Tensor, *, lr: float, log: bool = False) -> StepReport | None:
            self._fixed_shapes = True
            if int(self.state.step) == 10:
                x = x.clone()
                x[3, 2] = float("nan")
            return super().__call__(x, y, lr=lr, log=log)

    monkeypatch.setattr(module, "TrainStep", Poisoned)
    with pytest.raises(UserError, match=r"stopped before step 11.*step-000007"):
        train(config_of(run_settings, tmp_path / "run", log_every=1000))
    assert [c.step for c in module.list_checkpoints(tmp_path / "run")] == [7]
    assert json.loads((tmp_path / "run" / "diverged.json").read_text())["step"] == 11


def test_missing_and_unfinished_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --shards"):
        train(TrainConfig())
    with pytest.raises(UserError, match="not a shard set"):
        train(TrainConfig(shards=tmp_path))


@pytest.mark.parametrize("skip", [False, True])
def test_the_checkpoint_is_usable_as_it_stands(
    random_shards: ShardSet, run_settings: dict[str, Any], tmp_path: Path, skip: bool
) -> None:
    result = train(config_of(run_settings, tmp_path / "run", steps=60, skip=skip, checkpoint_every=60))
    transcoder = final(result)
    fvu = val_fvu(transcoder, random_shards)
    assert fvu == sorted(fvu, reverse=True), "FVU must fall from prefix to prefix"
    assert fvu[-1] < 0.5
    l0 = []
    for rows in (
        torch.cat(list(SetAside.draw(random_shards, 65_536, seed=0).source_rows(999))),
        torch.cat([block.rows()[0] for block in random_shards.val.blocks()]),
    ):
        x = apply_convention(rows, "normalized", source_site="resid_mid", norm=random_shards.norm)
        l0.append(float((transcoder.encode(x) > 0).sum(1).double().mean()))
    # k by construction where the threshold was set; on val it is a measurement
    assert l0[0] == pytest.approx(4, abs=0.02)
    assert l0[1] == pytest.approx(4, abs=0.3)


def test_group_sizes_change_what_is_learned(
    random_shards: ShardSet, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    # The project this one replaces logged an FVU per group and trained the last prefix only.
    by_sizes = {}
    for sizes in ((8, 16, 24), (16, 8, 24), (48,)):
        name = "-".join(map(str, sizes))
        result = train(config_of(run_settings, tmp_path / name, group_sizes=sizes, steps=40, seed=1))
        lines = (result.path / "metrics.jsonl").read_text().splitlines()
        by_sizes[sizes] = (json.loads(lines[0])["loss"], val_fvu(final(result), random_shards))
    assert len({loss for loss, _ in by_sizes.values()}) == 3
    nested = by_sizes[8, 16, 24][1]
    # A plain one has no good short prefix: its first 8 latents, cut out, are worth less.
    cut = final(TrainResult(tmp_path / "48", tmp_path / "48/checkpoints/step-000040", 40, 40))
    sums = FvuSums()
    for block in random_shards.val.blocks():
        source, target = block.rows()
        x = apply_convention(source, "normalized", source_site="resid_mid", norm=random_shards.norm)
        y_hat = cut.encode(x)[:, :8] @ cut.W_dec[:8] + cut.b_dec
        sums.add(target.float(), (y_hat - target.float()).square().sum(1)[None])
    assert nested[0] < 0.9 * sums.value()[0]


def test_a_planted_nested_dictionary_is_recovered(
    make_shards: Callable[..., ShardSet], run_settings: dict[str, Any], tmp_path: Path
) -> None:
    """x = sum_j c_j a_j and y = sum_j c_j b_j with sparse c >= 0: every b_j is a decoder row, cosine > 0.9.

    Five features fire often, fifteen seldom: a nest puts frequent ones into its first group.
    """
    g = torch.Generator().manual_seed(5)
    n_rows, n_frequent, n_rare, d_in, d_out = 15 * 1400, 5, 15, 80, 64
    a = normalize(torch.randn(n_frequent + n_rare, d_in, generator=g), dim=1)
    b = normalize(torch.randn(n_frequent + n_rare, d_out, generator=g), dim=1)
    frequent = torch.rand(n_rows, n_frequent, generator=g) < 0.25
    rare = torch.rand(n_rows, n_rare, generator=g) < 0.06
    c = torch.cat([frequent, rare], dim=1) * (1 + torch.rand(n_rows, n_frequent + n_rare, generator=g))
    shards = make_shards(c @ a, c @ b)
    # 2.15 features fire in a row on average; a k above that makes latents that stand for pairs of features.
    config = config_of(
        run_settings,
        tmp_path / "run",
        shards=shards.path,
        group_sizes=(8, 12, 20),
        k=2,
        steps=500,
        batch_tokens=512,
        buffer_tokens=8192,
        lr=1e-2,
        checkpoint_every=500,
        log_every=100,
        input="resid_mid",
    )
    transcoder = final(train(config))
    cosines = b @ transcoder.W_dec.T
    assert float(cosines.max(1).values.min()) > 0.9
    in_first_group = cosines[:, :8].max(1).values > 0.9
    assert in_first_group[:n_frequent].double().mean() > in_first_group[n_frequent:].double().mean()


def test_k_falls_over_the_run_and_ends_at_k(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(run_settings, tmp_path / "run", k_start=12, k_steps=16, log_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(config, StopAfter(11))
    result = train(config)
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    # The line of step s is about the batch of step s - 1, counted from 0: round(12 - 8 * (s - 1) / 16).
    assert [line["l0"] for line in lines] == pytest.approx([10, 8, 6, 4, 4, 4], abs=0.51)
    assert final(result).config.k == 4
