"""A shard set as written is what is read: bits, places, statistics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet

EXPECTED_ARRAYS = {
    "train/tokens": ((9, 2, 6), "int32"),
    "train/doc_ids": ((9, 2, 6), "int32"),
    "train/source": ((9, 6, 2, 12), "uint16"),
    "train/target": ((9, 6, 2, 10), "uint16"),
    "val/tokens": ((1, 3, 6), "int32"),
    "val/doc_ids": ((1, 3, 6), "int32"),
    "val/source": ((1, 6, 3, 12), "uint16"),
    "val/target": ((1, 6, 3, 10), "uint16"),
    "stats/shard_rows": ((9,), "int64"),
    **{
        f"stats/{site}/shard_{name}": ((9, 12), "float64")
        for site in ("source", "normalized")
        for name in ("sum", "sum_sq")
    },
    **{f"stats/target/shard_{name}": ((9, 10), "float64") for name in ("sum", "sum_sq")},
    **{
        f"stats/{site}/{name}": ((12,), "float64") for site in ("source", "normalized") for name in ("mean", "variance")
    },
    **{f"stats/target/{name}": ((10,), "float64") for name in ("mean", "variance")},
    **{f"stats/{side}/row_norm": ((9, 6, 2), "float32") for side in ("source", "target")},
    "norm/gain": ((12,), "float32"),
    "norm/bias": ((12,), "float32"),
}


def test_toy_set_is_as_uneven_as_the_tests_need(toy: Any) -> None:
    assert toy.manifest.splits["train"].shard_contexts == (2,) * 8 + (1,)
    assert toy.manifest.splits["val"].shard_contexts == (3,)


@pytest.mark.parametrize("codec", ["compact", "raw"])
def test_written_is_read_bit_for_bit(codec: str, make_toy: Any, tmp_path: Path) -> None:
    toy = make_toy(codec)
    # Bits that arithmetic would not keep: negative zero, a subnormal, a huge value.
    odd = torch.tensor([-0.0, 1e-40, 1e18], dtype=torch.bfloat16)
    toy.pieces["train", 2][2][3, 1, :3] = odd
    shards = ShardSet.open(toy.write(tmp_path / "set"), verify=True)
    assert shards.manifest.codec == codec
    for (name, shard), (tokens, doc_ids, source, target) in toy.pieces.items():
        split = shards.split(name)
        assert torch.equal(split.tokens(shard), tokens)
        assert torch.equal(split.doc_ids(shard), doc_ids)
        for side, values in (("source", source), ("target", target)):
            read = split.activations(side, shard)
            assert read.dtype == torch.bfloat16
            assert torch.equal(read.view(torch.int16), values.view(torch.int16))
            assert torch.equal(split.activations(side, shard, 1, 4), values[1:4])


def test_activations_lie_position_major(toy: Any, toy_path: Path) -> None:
    """source[s, p, c] on the disk belongs to tokens[s, c, p]."""
    import zarr

    root: Any = zarr.open_group(str(toy_path), mode="r")
    for shard in (0, 8):
        tokens, _, source, target = toy.pieces["train", shard]
        for context in range(tokens.shape[0]):
            for position in range(tokens.shape[1]):
                assert root["train/tokens"][shard, context, position] == tokens[context, position]
                for side, values in (("source", source), ("target", target)):
                    bits = root[f"train/{side}"][shard, position, context].view(np.int16)
                    assert np.array_equal(bits, values[position, context].view(torch.int16).numpy())


def test_blocks_cover_every_row_once_in_order(toy: Any, toy_path: Path) -> None:
    shards = ShardSet.open(toy_path)
    for name in ("train", "val"):
        blocks = list(shards.split(name).blocks())
        for (split, shard), (tokens, doc_ids, source, target) in toy.pieces.items():
            if split != name:
                continue
            here = [block for block in blocks if block.shard == shard]
            assert [block.first_position for block in here] == list(range(0, 6, shards.split(name).chunk_positions))
            assert torch.equal(torch.cat([block.tokens for block in here]), tokens.T)
            assert torch.equal(torch.cat([block.doc_ids for block in here]), doc_ids.T)
            assert torch.equal(torch.cat([block.source for block in here]), source)
            assert torch.equal(torch.cat([block.target for block in here]), target)
            keep = torch.tensor([[int(t) not in (0, 3) for t in context] for context in tokens]).T
            assert torch.equal(torch.cat([block.keep for block in here]), keep)
            x, y = (torch.cat(rows) for rows in zip(*(block.rows() for block in here), strict=True))
            assert torch.equal(x, source[keep])
            assert torch.equal(y, target[keep])


@pytest.mark.parametrize("kind", ["layer", "rms", None])
def test_statistics_equal_those_of_the_raw_rows(kind: str | None, make_toy: Any, tmp_path: Path) -> None:
    toy = make_toy(norm=kind)
    shards = ShardSet.open(toy.write(tmp_path / "set"))
    rows = {side: toy.kept_rows(side).numpy() for side in ("source", "target")}
    if kind is not None:
        raw = torch.from_numpy(rows["source"])
        for name, convention in (("normalized", "normalized"), ("with_gain", "mlp_in")):
            rows[name] = apply_convention(raw, convention, source_site="resid_mid", norm=toy.norm).double().numpy()
    for name, values in rows.items():
        stats = shards.stats(name)
        assert stats.mean.dtype == stats.variance.dtype == torch.float64
        np.testing.assert_allclose(stats.mean.numpy(), values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.variance.numpy(), values.var(0), rtol=1e-5, atol=1e-6)
    # The raw sides go through no float32 arithmetic, so they hold to float64.
    np.testing.assert_allclose(shards.stats("source").mean.numpy(), rows["source"].mean(0), rtol=1e-12)
    if kind is None:
        assert shards.norm is None
        with pytest.raises(UserError, match="no statistics of 'normalized'; it has those of source, target"):
            shards.stats("with_gain")


def test_norm_quantiles_are_over_kept_train_rows(toy: Any, toy_path: Path) -> None:
    for side in ("source", "target"):
        norms = np.sqrt((toy.kept_rows(side).numpy() ** 2).sum(1))
        found = ShardSet.open(toy_path).norm_quantiles(side)
        assert set(found) >= {0.0, 0.5, 0.99, 1.0}
        for level, value in found.items():
            assert value == pytest.approx(np.quantile(norms, level), rel=1e-5)


def test_norm_comes_back(toy: Any, toy_path: Path) -> None:
    norm = ShardSet.open(toy_path).norm
    assert norm is not None
    assert (norm.kind, norm.eps) == (toy.norm.kind, toy.norm.eps)
    assert torch.equal(norm.gain, toy.norm.gain)
    assert norm.bias is not None
    assert torch.equal(norm.bias, toy.norm.bias)


def test_facts_and_sizes(toy: Any, toy_path: Path) -> None:
    shards = ShardSet.open(toy_path)
    assert (shards.name, shards.d_in, shards.d_out, shards.ctx_len) == ("l1", 12, 10, 6)
    assert (shards.train.n_contexts, shards.train.n_shards, shards.val.n_contexts) == (17, 9, 3)
    shard_files = [p for p in toy_path.rglob("*") if p.is_file() and "c" in p.relative_to(toy_path).parts]
    summary = sum(file.size for file in shards.manifest.summary.values())
    assert shards.bytes_on_disk() == sum(p.stat().st_size for p in shard_files) - summary
    for record in shards.records:
        tokens, _, source, target = toy.pieces[record.split, record.shard]
        assert record.n_contexts == tokens.shape[0]
        assert record.n_rows == sum(int(t) not in (0, 3) for t in tokens.flatten())
        assert record.largest == {"source": float(source.abs().max()), "target": float(target.abs().max())}
    with pytest.raises(UserError, match="no split 'test'"):
        shards.split("test")


def test_digest_follows_the_content(toy_path: Path, make_toy: Any, tmp_path: Path) -> None:
    again, other = make_toy(), make_toy()
    other.pieces["val", 0][2][0, 0, 0] += 8
    same = ShardSet.open(again.write(tmp_path / "same"))
    changed = ShardSet.open(other.write(tmp_path / "changed"))
    assert same.digest == ShardSet.open(toy_path).digest
    assert changed.digest != same.digest


@pytest.mark.process
def test_anyone_can_open_it_with_zarr_without_a_warning(toy_path: Path) -> None:
    """A process of its own, so that no warning has been seen and silenced before."""
    code = (
        "import sys, zarr; root = zarr.open(sys.argv[1]); print(root.tree())\n"
        "for name, node in root.members(max_depth=None):\n"
        "    if isinstance(node, zarr.Array): print('ARRAY', name, node.shape, node.dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(toy_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("ARRAY")}
    assert found == {name: f"ARRAY {name} {shape} {dtype}" for name, (shape, dtype) in EXPECTED_ARRAYS.items()}


def test_metadata_says_how_to_read_the_bits(toy_path: Path) -> None:
    import json

    source = json.loads((toy_path / "train/source/zarr.json").read_text())
    assert source["attributes"]["logical_dtype"] == "bfloat16"
    assert source["attributes"]["hook_point"] == "blocks.1.hook_resid_mid"
    (sharding,) = source["codecs"]
    blosc = sharding["configuration"]["codecs"][-1]
    assert blosc["name"] == "blosc"
    assert blosc["configuration"] == {
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle",
        "typesize": 2,
        "blocksize": 512 * 1024,
    }
