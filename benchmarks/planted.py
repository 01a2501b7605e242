"""Absorption against a known truth: planted trees of features, Matryoshka beside plain BatchTopK.

    python -m benchmarks.planted                       all cases, five seeds each
    python -m benchmarks.planted --seeds 1 --only 0    one case, one seed

(From the root of the checkout, as `python -m benchmarks.evaluate`, whose name would hide the package.)

Both train with the same k, width, steps, learning rate, seed and rows; only the groups differ. Columns, means over the
seeds (+- standard deviation):
    absorbed   share of the rows with a child on which no latent of the parent fires (benchmarks/planted_trees.py)
    alone      the same share over the rows with the parent and no child: what is missed for other reasons
    cosine     of its nearest latent's decoder row with the parent's true direction at the target
    FVU, L0    on held-out rows, in threshold mode
    fraction, full    SAEBench's two scores as `evaluate absorption` computes them, with parents for letters: they are
               told of the parents' presence, and neither of directions nor of children
    main       latents that they take for the parent's: a child's latent is one where it raises the F1 by 0.03
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.planted_trees import PlantedRows, PlantedTrees, planted_absorption, write_planted
from evaluate.analyses.absorption.main_latents import find_main_latents
from evaluate.analyses.absorption.readback import fit_readback, norm_directions
from evaluate.analyses.absorption.scores import score_rows
from evaluate.measures.probe import fit_probe
from evaluate.measures.row_acts import encode_rows
from matryoshka.transcoder import Transcoder
from train.config import TrainConfig
from train.run import train

SMALL = PlantedTrees(d_in=64, d_out=56, n_parents=10, n_children=4, p_parent=0.2, p_child=0.7)
LARGE = PlantedTrees(d_in=96, d_out=80, n_parents=20, n_children=4, p_parent=0.15, p_child=0.7)
LOUD = replace(SMALL, child_scale=2.0)
MANY = PlantedTrees(d_in=96, d_out=80, n_parents=5, n_children=24, p_parent=0.24, p_child=0.7)
TRAIN_SEED, TEST_SEED = 1001, 1002


@dataclass(frozen=True)
class Case:
    """Trees, k, and the groups of the Matryoshka."""

    name: str
    trees: PlantedTrees
    k: int
    group_sizes: tuple[int, ...]
    times: float = 1.0
    """Steps, times those of --steps."""


CASES = [
    Case("10 trees, k 3 (3.4 features a row)", SMALL, 3, (10, 40)),
    Case("5 trees of 24 rare children, k 2", MANY, 2, (5, 120), 2.5),
    Case("10 trees, k 2", SMALL, 2, (10, 40)),
    Case("10 trees, k 4", SMALL, 4, (10, 40)),
    Case("20 trees, k 4 (5.1 features a row)", LARGE, 4, (20, 80)),
    Case("first group too small", SMALL, 3, (5, 45)),
    Case("first group too large", SMALL, 3, (20, 30)),
    Case("three groups", SMALL, 3, (5, 10, 35)),
    Case("children twice as loud", LOUD, 3, (10, 40)),
]


def trained(case: Case, group_sizes: tuple[int, ...], seed: int, steps: int, out: Path) -> Transcoder:
    """A transcoder of one case, or the one that an earlier command trained."""
    trees = replace(case.trees, seed=seed)
    name = f"{abs(hash_of(trees)):016x}"
    shards = out / f"set-{name}"
    if not (shards / "stats").exists():
        write_planted(shards, trees, 30_000, seed)
    config = TrainConfig(
        shards=shards,
        out=out / f"run-{name}-k{case.k}-{'-'.join(map(str, group_sizes))}-{steps}",
        group_sizes=group_sizes,
        k=case.k,
        steps=steps,
        batch_tokens=512,
        buffer_tokens=8192,
        lr=3e-3,
        seed=seed,
        device="cpu",
    )
    result = train(config)
    if result.checkpoint is None or result.outcome != "finished":
        raise SystemExit(f"{result.path}: {result.outcome} after {result.n_steps} steps")
    return Transcoder.load(result.checkpoint)


def hash_of(trees: PlantedTrees) -> int:
    """A number that is the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(trees).encode()).digest()[:8], "big")


def numbers(transcoder: Transcoder, trees: PlantedTrees) -> list[float]:
    """One line of the table."""
    train_rows, test_rows = (trees.sample(20_000, seed) for seed in (TRAIN_SEED, TEST_SEED))
    truth = planted_absorption(transcoder, trees, test_rows)
    acts = transcoder.encode(test_rows.x)
    error = (test_rows.y - transcoder.decode(acts)).square().sum()
    fvu = float(error / (test_rows.y - test_rows.y.mean(0)).square().sum())
    cosine, alone = (math.fsum(values) / len(values) for values in (truth.cosine, truth.missed_alone))
    l0 = float((acts > 0).sum(1).double().mean())
    return [truth.mean, alone, cosine, fvu, l0, *published(transcoder, trees, train_rows, test_rows)]


def published(
    transcoder: Transcoder, trees: PlantedTrees, train_rows: PlantedRows, test_rows: PlantedRows
) -> list[float]:
    """Means over the parents: the absorption fraction, full absorption, and the number of main latents."""
    probes = [
        fit_probe(train_rows.x.numpy(), train_rows.parents[:, parent].numpy(), c=0.01, balanced=True)
        for parent in range(trees.n_parents)
    ]
    directions = torch.from_numpy(np.stack([probe.direction() for probe in probes], axis=1)).float()
    on_train, on_test = (encode_rows(transcoder, rows.x) for rows in (train_rows, test_rows))
    projected = train_rows.x @ torch.cat([directions, norm_directions(trees.d_in, 0)], dim=1)
    readback = fit_readback(on_train, projected)
    fraction, full, n_main = [], [], []
    for parent, probe in enumerate(probes):
        y_train, y_test = (rows.parents[:, parent].numpy() for rows in (train_rows, test_rows))
        main = find_main_latents(on_train, y_train, on_test, y_test, jump=0.03, seed=0)
        right = y_test & (probe.score(test_rows.x.numpy()) > 0)
        total = (test_rows.x @ directions[:, parent] - readback.intercept[parent]).double().numpy()[right]
        along, cosine = (side[:, parent].double().numpy() for side in (readback.along, readback.cosine()))
        scores = score_rows(on_test.rows(torch.from_numpy(right)), total, along, cosine, main.latents)
        fraction.append(scores.fraction.mean())
        full.append(scores.full.mean())
        n_main.append(len(main.latents))
    return [float(np.mean(values)) for values in (fraction, full, n_main)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="Where to keep sets and runs. (a temporary folder)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--only", type=int, default=None, help="Number of one case, from 0. (all of them)")
    options = parser.parse_args()
    columns = ("absorbed", "alone", "cosine", "FVU", "L0", "fraction", "full", "main")
    print(f"{options.seeds} seeds, {options.steps} steps of 512 rows, lr 3e-3\n")
    print(f"{'':36}{'groups':12}" + "".join(f"{name:>15}" for name in columns))
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        for number, case in enumerate(CASES):
            if options.only not in (None, number):
                continue
            width = sum(case.group_sizes)
            for groups in (case.group_sizes, (width,)):
                lines = []
                for seed in range(options.seeds):
                    transcoder = trained(case, groups, seed, round(options.steps * case.times), out)
                    lines.append(numbers(transcoder, replace(case.trees, seed=seed)))
                means, spread = np.mean(lines, axis=0), np.std(lines, axis=0, ddof=min(1, len(lines) - 1))
                cells = "".join(f"{mean:8.3f} +-{sd:.3f}" for mean, sd in zip(means, spread, strict=True))
                print(f"{case.name:36}{'/'.join(map(str, groups)):12}{cells}", flush=True)


if __name__ == "__main__":
    main()
