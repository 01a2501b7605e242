"""Sums over the rows of a shard: against plain loops in float64, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matryoshka.norms import Norm
from matryoshka.shards import row_sums as module
from matryoshka.shards.row_sums import row_blocks, row_sums

SHAPE = (7, 5, 12)


def rows(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(SHAPE, generator=generator) * torch.arange(1, 13) + 100).bfloat16()
    return values, torch.rand(SHAPE[:2], generator=generator) > 0.3


@pytest.mark.parametrize("block_values", [1, 40, 2**17])
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_against_plain_loops(block_values: int, norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_VALUES", block_values)
    values, keep = rows(0)
    keep[3] = True  # some blocks are kept whole
    keep[4] = False  # and of some there is nothing
    the_norm = None if norm is None else Norm(kind=norm, eps=1e-5, gain=torch.ones(12))  # type: ignore[arg-type]
    norms, sums = row_sums(values, keep, the_norm)
    wanted = [torch.zeros(2, 12, dtype=torch.float64) for _ in sums]
    for p in range(7):
        for c in range(5):
            row = values[p, c].float()
            assert float(norms[p, c]) == pytest.approx(float(row.double().norm()), rel=1e-6)
            if not keep[p, c]:
                continue
            forms = [row] if the_norm is None else [row, the_norm.normalized(row)]
            for total, form in zip(wanted, forms, strict=True):
                total += torch.stack([form.double(), form.double() ** 2])
    assert len(sums) == (1 if norm is None else 2)
    torch.testing.assert_close(sums[0], wanted[0], rtol=1e-14, atol=0)  # bfloat16 and its squares are exact in float64
    for found, total in zip(sums[1:], wanted[1:], strict=True):
        torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)


def test_the_same_bits_with_more_threads() -> None:
    values, keep = torch.randn(512, 3, 257, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.ones(512, 3)
    norm = Norm(kind="rms", eps=1e-5, gain=torch.ones(257))
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            norms, sums = row_sums(values, keep > 0, norm)
            found.append([norms, *sums])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_blocks_are_all_rows_in_order() -> None:
    values, _ = rows(2)
    taken = torch.cat([block.clone() for _, block in row_blocks(values.transpose(0, 1))])
    assert torch.equal(taken, values.transpose(0, 1).reshape(-1, 12).float())
