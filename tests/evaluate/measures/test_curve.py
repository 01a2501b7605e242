"""Each point of the curve against a transcoder whose thresholds were really moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluate.analyses.reconstruction.row_pass import Measurement
from evaluate.config import EvaluateConfig
from evaluate.measures.activations import active_latents, base_output
from evaluate.measures.curve import CurveSums
from evaluate.rows.batches import row_batches
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

SCALES = (1.7, 1.0, 0.6, 0.3)


@pytest.mark.parametrize("skip", [False, True])
def test_points_against_moved_thresholds(made: Any, skip: bool) -> None:
    transcoder = made.transcoder(skip=skip)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(29, made.d_in, generator=generator), torch.randn(29, made.d_out, generator=generator)
    curve = CurveSums(SCALES)
    floor = transcoder.threshold.clamp_min(0) * 0.2
    for start in range(0, 29, 8):
        here = slice(start, start + 8)
        base = base_output(transcoder, x[here])
        curve.add(transcoder, active_latents(transcoder, x[here], floor), base, y[here])
    target = y.double().numpy()
    variance = ((target - target.mean(0)) ** 2).sum()
    points = curve.value()
    assert [point.threshold_scale for point in points] == list(SCALES)
    for point in points:
        moved = Transcoder(transcoder.config)
        moved.set_weights(dict(transcoder.named_parameters()))
        moved.threshold.mul_(point.threshold_scale)
        acts = moved.encode(x)
        for i, y_hat in enumerate(moved.nested(acts, x=x)):
            fvu = ((target - y_hat.double().numpy()) ** 2).sum() / variance
            assert point.fvu[i] == pytest.approx(fvu, rel=1e-5)
            assert point.l0[i] == pytest.approx(float((acts[:, : moved.prefix_ends[i]] != 0).sum()) / 29)
    assert [point.l0[-1] for point in points] == sorted(point.l0[-1] for point in points)


def test_no_rows_no_points() -> None:
    assert CurveSums(SCALES).value() == ()


@pytest.mark.parametrize(("curve_tokens", "step"), [(0, 0), (1, 16), (5, 16), (6, 15), (30, 3), (88, 1), (10_000, 1)])
def test_the_curve_takes_every_nth_row_but_never_fewer_than_a_sixteenth(
    val_set: ShardSet, made: Any, curve_tokens: int, step: int
) -> None:
    config = EvaluateConfig(shards=val_set.path, curve_tokens=curve_tokens)
    sums = Measurement(made.transcoder(), val_set, config)
    n_rows = 0
    for batch in row_batches(val_set.val, 7):
        sums.add(batch)
        n_rows += len(batch)
    assert n_rows == 88
    assert {fvu.n_rows for fvu in sums.curve.fvu} == {0 if step == 0 else len(range(0, n_rows, step))}
