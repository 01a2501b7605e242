"""FVU, L0, cosine and norm ratio of each prefix, against plain numpy over all rows at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evaluate.measures.activations import active_latents, base_output, group_counts, group_sums
from evaluate.measures.reconstruction import ReconstructionSums, row_errors
from matryoshka.transcoder import Transcoder, TranscoderConfig


def measured(transcoder: Transcoder, x: torch.Tensor, y: torch.Tensor, batch: int) -> ReconstructionSums:
    sums = ReconstructionSums()
    for start in range(0, len(x), batch):
        here = slice(start, start + batch)
        active = active_latents(transcoder, x[here])
        counts = group_counts(transcoder, active)
        per_group = group_sums(transcoder, active, counts)
        sums.add(y[here], row_errors(base_output(transcoder, x[here]), per_group, counts, y[here]))
    return sums


@pytest.mark.parametrize("skip", [False, True])
def test_against_the_obvious_twin(made: Any, skip: bool) -> None:
    transcoder = made.transcoder(skip=skip)
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(41, made.d_in, generator=generator), torch.randn(41, made.d_out, generator=generator) + 2
    y[3] = 0
    dense = transcoder.encode(x)
    got = measured(transcoder, x, y, 7).value(transcoder)
    target = y.double().numpy()
    for i, y_hat in enumerate(transcoder.nested(dense, x=x)):
        guess = y_hat.double().numpy()
        lengths = np.linalg.norm(target, axis=1) * np.linalg.norm(guess, axis=1)
        cosine = np.divide((target * guess).sum(1), lengths, out=np.zeros(41), where=lengths > 0)
        fvu = ((target - guess) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
        end = transcoder.prefix_ends[i]
        assert got[i].fvu == pytest.approx(fvu, rel=1e-5)
        assert got[i].cosine == pytest.approx(cosine.mean(), rel=1e-5)
        assert got[i].norm_ratio == pytest.approx(
            np.linalg.norm(guess, axis=1).sum() / np.linalg.norm(target, axis=1).sum(), rel=1e-5
        )
        assert got[i].l0 == pytest.approx(float((dense[:, :end] != 0).sum(1).double().mean()), rel=1e-12)
        assert (got[i].group_size, got[i].prefix_end) == (made.group_sizes[i], end)


def test_two_latents_by_hand(made: Any) -> None:
    config = TranscoderConfig(d_in=1, d_out=2, group_sizes=(1, 1), k=1, **made.facts)
    transcoder = Transcoder(config)
    transcoder.set_weights(
        {
            "W_enc": torch.tensor([[1.0, -1.0]]),
            "b_enc": torch.zeros(2),
            "W_dec": torch.eye(2),
            "b_dec": torch.zeros(2),
            "threshold": torch.tensor([0.5, 0.5]),
        }
    )
    # acts: (3, 0), (0, 4), and 0.5 is not above the threshold
    x = torch.tensor([[3.0], [-4.0], [0.5]])
    y = torch.tensor([[3.0, 0.0], [0.0, 8.0], [0.0, 0.0]])
    first, both = measured(transcoder, x, y, 2).value(transcoder)
    # mean(y) = (1, 8/3); variance 9 + 64 - 3 * (1 + 64/9) = 146/3
    assert first.fvu == pytest.approx(64 / (146 / 3))
    assert both.fvu == pytest.approx(16 / (146 / 3))
    assert (first.l0, both.l0) == pytest.approx((1 / 3, 2 / 3))
    assert (first.cosine, both.cosine) == pytest.approx((1 / 3, 2 / 3))
    assert (first.norm_ratio, both.norm_ratio) == pytest.approx((3 / 11, 7 / 11))


def test_an_exact_transcoder_has_fvu_zero(made: Any) -> None:
    config = TranscoderConfig(d_in=3, d_out=3, group_sizes=(3, 3), k=3, **made.facts)
    transcoder = Transcoder(config)
    transcoder.set_weights(
        {
            "W_enc": torch.cat([torch.eye(3), -torch.eye(3)], 1),
            "b_enc": torch.zeros(6),
            "W_dec": torch.cat([torch.eye(3), -torch.eye(3)]),
            "b_dec": torch.zeros(3),
            "threshold": torch.zeros(6),
        }
    )
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(6))
    first, both = measured(transcoder, x, x, 11).value(transcoder)
    assert both.fvu == 0.0
    assert both.cosine == pytest.approx(1, abs=1e-6)
    assert both.norm_ratio == pytest.approx(1)
    assert both.l0 == 3.0
    assert first.fvu is not None
    assert first.fvu > 0.2


def test_targets_that_do_not_vary_have_no_fvu(made: Any) -> None:
    transcoder = made.transcoder()
    x = torch.randn(4, made.d_in, generator=torch.Generator().manual_seed(7))
    assert measured(transcoder, x, torch.zeros(4, made.d_out), 4).value(transcoder)[0].fvu is None
