"""Nested prefixes as transcoders of their own, and how many groups a row needs."""

from __future__ import annotations

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.transcoder import Transcoder, TranscoderConfig

GROUPS = (5, 11, 32)


def make(*, skip: bool = False, k: int = 9) -> Transcoder:
    transcoder = Transcoder(TranscoderConfig(d_in=12, d_out=10, group_sizes=GROUPS, k=k, skip=skip, model="toy"))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in transcoder.named_parameters()}
    weights["threshold"] = torch.rand(48, generator=generator) * 4 + 6  # so that some rows need few groups
    transcoder.set_weights(weights)
    return transcoder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_a_prefix_is_the_nested_reconstruction(n_groups: int, skip: bool) -> None:
    transcoder, x = make(skip=skip), torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    prefix = transcoder.prefix(n_groups)
    assert prefix.config.group_sizes == GROUPS[:n_groups]
    assert (prefix.config.k, prefix.config.model) == (5 if n_groups == 1 else 9, "toy")
    torch.testing.assert_close(prefix(x), transcoder(x, n_groups), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(prefix(x), transcoder.nested(transcoder.encode(x), x=x)[n_groups - 1])
    before = transcoder.W_enc.clone()
    prefix.W_enc.zero_()
    assert torch.equal(transcoder.W_enc, before)  # a copy


def test_there_is_no_prefix_of_nothing() -> None:
    for n_groups in (0, 4):
        with pytest.raises(UserError, match="has 3 nested groups"):
            make().prefix(n_groups)


def test_active_groups_are_just_enough() -> None:
    transcoder, x = make(), torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    needed = transcoder.active_groups(x)
    assert needed.dtype == torch.int64
    assert set(needed.tolist()) == {0, 1, 2, 3}
    full = transcoder(x)
    for row, n in zip(range(200), needed.tolist(), strict=True):
        one = x[row : row + 1]
        enough = transcoder.b_dec if n == 0 else transcoder(one, n)[0]
        torch.testing.assert_close(enough, full[row], atol=1e-5, rtol=1e-5)
        if n > 0:
            less = transcoder.b_dec if n == 1 else transcoder(one, n - 1)[0]
            assert (less - full[row]).norm() > 1e-3
