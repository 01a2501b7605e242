"""Where absorption is known: a Matryoshka transcoder against plain BatchTopK of equal k, width, steps, seed and rows.

The fuller table, cases in which it helps less among them, is that of benchmarks/planted.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.planted_trees import PlantedAbsorption, PlantedTrees, planted_absorption, write_planted
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig
from train.config import TrainConfig
from train.run import train

TREES = PlantedTrees(d_in=64, d_out=56, n_parents=10, n_children=4, p_parent=0.2, p_child=0.7)


def measured(
    shards: Path, out: Path, trees: PlantedTrees, group_sizes: tuple[int, ...], seed: int
) -> PlantedAbsorption:
    config = TrainConfig(
        shards=shards,
        out=out,
        group_sizes=group_sizes,
        k=3,
        steps=500,
        batch_tokens=512,
        buffer_tokens=8192,
        lr=3e-3,
        seed=seed,
        device="cpu",
    )
    checkpoint = train(config).checkpoint
    assert checkpoint is not None
    return planted_absorption(Transcoder.load(checkpoint), trees, trees.sample(10_000, seed=1002))


def test_matryoshka_absorbs_less_than_plain_batch_topk(tmp_path: Path) -> None:
    """3.4 features are present in a row and 3 may be written: plain BatchTopK writes parent and child with one latent.

    Of the seeds 0 to 9 all favour the Matryoshka, by 0.13 at least and 0.31 on average.
    """
    plain, matryoshka = [], []
    for seed in range(2):
        trees, folder = replace(TREES, seed=seed), tmp_path / str(seed)
        write_planted(folder / "set", trees, 20_000, seed)
        plain.append(measured(folder / "set", folder / "plain", trees, (50,), seed))
        matryoshka.append(measured(folder / "set", folder / "matryoshka", trees, (10, 40), seed))
    pairs = [(one.mean, other.mean) for one, other in zip(plain, matryoshka, strict=True)]
    assert all(other < one for one, other in pairs), pairs
    assert sum(one - other for one, other in pairs) / 2 > 0.15, pairs
    # It is the children that silence the parents' latents, not that those were never found.
    for found in (*plain, *matryoshka):
        assert sum(found.missed_alone) / TREES.n_parents < 0.2
        assert min(found.cosine) > 0.6


def test_a_child_is_never_without_its_parent_and_equal_seeds_give_equal_rows() -> None:
    trees = PlantedTrees(n_parents=3, n_children=5)
    rows = trees.sample(4000, seed=1)
    assert bool((~rows.children.any(2) | rows.parents).all())
    assert int(rows.children.sum(2).max()) == 1
    present = rows.parents.sum() + rows.children.sum()
    assert float(present) / 4000 == pytest.approx(trees.mean_present, rel=0.05)
    assert torch.equal(rows.x, trees.sample(4000, seed=1).x)
    assert not torch.equal(rows.x, trees.sample(4000, seed=2).x)


def test_absorption_is_counted_by_hand() -> None:
    """Two trees of one child in orthogonal directions; child 0 silences its parent's latent, child 1 does not."""
    trees = PlantedTrees(d_in=4, d_out=4, n_parents=2, n_children=1, noise=0.0, spread=0.0)
    source, target = torch.eye(4), torch.eye(4)
    object.__setattr__(trees, "directions", lambda: (source, target))
    transcoder = Transcoder(TranscoderConfig(d_in=4, d_out=4, group_sizes=(4,), k=2))
    W_enc = torch.eye(4)
    W_enc[2, 0] = -1.0  # latent 0 reads parent 0 less child 0
    W_dec = torch.eye(4)
    W_dec[2, 0] = 1.0  # and latent 2 writes both
    weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(4), "b_dec": torch.zeros(4)}
    transcoder.set_weights({**weights, "threshold": torch.full((4,), 0.5)})
    found = planted_absorption(transcoder, trees, trees.sample(500, seed=0))
    assert found.latents == ((0,), (1,))
    assert found.absorbed == (1.0, 0.0)
    assert found.missed_alone == (0.0, 0.0)
    assert found.mean == 0.5


def test_a_planted_set_is_an_ordinary_one(tmp_path: Path) -> None:
    write_planted(tmp_path / "set", PlantedTrees(), 3000)
    shards = ShardSet.open(tmp_path / "set", verify=True)
    assert (shards.d_in, shards.d_out) == (40, 32)
    assert shards.norm is None
    assert sum(record.n_rows for record in shards.records) >= 3000
