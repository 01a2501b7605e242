"""The int8 codec against plain loops, and how much it loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka.shards import ShardSet
from matryoshka.shards.scaled import to_scaled, unscale

CTX, CONTEXTS, WIDTH = 9, 7, 48


@pytest.fixture
def values() -> Tensor:
    """Channels of very different size, one of them a hundred times the others, and two sinks in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CTX, CONTEXTS, WIDTH, generator=generator) * torch.linspace(0.5, 3, WIDTH)
    x[..., 5] *= 100
    x[0, :, 5] = 40_000.0
    x[4, 2, 5] = -50_000.0
    x[..., 7] = 0
    x[3, 3] = 0
    return x.bfloat16()


def test_codes_equal_those_of_plain_loops(values: Tensor) -> None:
    keep = torch.ones(CTX, CONTEXTS, dtype=torch.bool)
    keep[0] = False
    scaled, loss = to_scaled(values, keep)
    x = values.double().numpy()
    norms = np.sqrt((x**2).sum(2))
    kept = np.sort(norms[keep.numpy()])
    ordinary = keep.numpy() & (norms <= 10 * kept[(len(kept) - 1) // 2])
    assert not ordinary[4, 2]
    channel = np.sqrt((x[ordinary] ** 2).mean(0))
    channel[channel == 0] = 1
    np.testing.assert_allclose(scaled.channel.numpy(), channel, rtol=1e-6)
    error, total = 0.0, 0.0
    read = scaled.values()
    assert read.dtype == torch.bfloat16
    for p in range(CTX):
        for c in range(CONTEXTS):
            largest = np.abs(x[p, c] / channel).max()
            scale = largest / 127 if largest else 1.0
            assert float(scaled.scale[p, c]) == pytest.approx(scale, rel=1e-6)
            q = x[p, c] / channel / scale
            assert np.abs(scaled.q[p, c].numpy() - q).max() <= 0.5 + 1e-3
            decoded = scaled.q[p, c].double().numpy() * channel * scale
            np.testing.assert_allclose(read[p, c].double().numpy(), decoded, rtol=2**-8, atol=1e-30)
            if ordinary[p, c]:
                error += ((x[p, c] - read[p, c].double().numpy()) ** 2).sum()
                total += (x[p, c] ** 2).sum()
    assert loss.error_sq == pytest.approx(error, rel=1e-6)
    assert loss.total_sq == pytest.approx(total, rel=1e-6)


def test_a_sink_does_not_cost_the_other_rows_their_bits(values: Tensor) -> None:
    keep = torch.ones(CTX, CONTEXTS, dtype=torch.bool)
    keep[0] = False
    scaled, loss = to_scaled(values, keep)
    x, read = values.double(), scaled.values().double()
    # the sinks themselves are well kept too
    for p, c in ((0, 0), (0, 6), (4, 2)):
        assert float((x[p, c] - read[p, c]).norm() / x[p, c].norm()) < 0.005
    # had the channel's factor followed them, the rows beside them would have lost ten times as much
    everywhere, _ = to_scaled(values, torch.zeros_like(keep))
    naive = (x - everywhere.values().double())[1:].square().sum() - (x - everywhere.values().double())[
        4, 2
    ].square().sum()
    assert float(naive) > 100 * loss.error_sq
    assert bool((read[3, 3] == 0).all())
    assert bool((read[..., 7] == 0).all())


def test_rows_that_are_all_special_are_coded_too(values: Tensor) -> None:
    scaled, loss = to_scaled(values, torch.zeros(CTX, CONTEXTS, dtype=torch.bool))
    assert bool(torch.isfinite(scaled.values()).all())
    assert loss.total_sq > 0


def test_decoding_is_the_product(values: Tensor) -> None:
    scaled, _ = to_scaled(values, torch.ones(CTX, CONTEXTS, dtype=torch.bool))
    part = unscale(scaled.q[2:5], scaled.channel, scaled.scale[2:5])
    wanted = scaled.q[2:5].float() * scaled.channel * scaled.scale[2:5, :, None]
    assert torch.equal(part, wanted.bfloat16())


def test_a_set_in_int8_is_read_as_its_values(make_toy: Any, tmp_path: Path) -> None:
    toy = make_toy("int8")
    path = toy.write(tmp_path / "set")
    shards = ShardSet.open(path, verify=True)
    read: dict[str, list[Tensor]] = {"source": [], "target": []}
    for (name, shard), (tokens, _, source, target) in toy.pieces.items():
        split = shards.split(name)
        keep = split.keep(shard)
        for side, values in (("source", source), ("target", target)):
            found = split.activations(side, shard)
            assert torch.equal(found, to_scaled(values, keep)[0].values())
            for start, stop in ((0, 2), (1, 4), (3, 6)):
                assert torch.equal(split.activations(side, shard, start, stop), found[start:stop])
            if name == "train":
                read[side].append(found[keep])
        assert torch.equal(split.tokens(shard), tokens)
        record = next(r for r in shards.records if (r.split, r.shard) == (name, shard))
        assert set(record.loss) == {"source", "target"}
    # statistics are of what a reader gets
    for side, rows in read.items():
        wanted = torch.cat(rows).double()
        torch.testing.assert_close(shards.stats(side).mean, wanted.mean(0), rtol=1e-9, atol=1e-12)
        assert shards.norm_quantiles(side)[1.0] == pytest.approx(float(wanted.norm(dim=1).max()), rel=1e-5)
    measured = shards.manifest.measured
    assert 0.001 < measured["source_error"] < 0.02
    assert set(measured) == {"compression_ratio", "source_error", "target_error"}
    blocks = torch.cat([block.source[block.keep] for block in shards.train.blocks()])
    assert len(blocks) == len(torch.cat(read["source"]))


def test_ratio_of_a_lossless_codec_is_stored(make_toy: Any, tmp_path: Path) -> None:
    raw = ShardSet.open(make_toy("raw").write(tmp_path / "raw"))
    # the index of a shard file comes on top: 16 bytes a chunk and its checksum
    assert 1.0 < raw.manifest.measured["compression_ratio"] < 1.5
    assert set(raw.manifest.measured) == {"compression_ratio"}
