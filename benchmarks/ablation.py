"""The choices that decide a short run, compared at equal steps on real activations: one fleet, one table.

    python benchmarks/ablation.py --shards data/demo/l15 --out data/runs/ablation

Held-out FVU is that of the whole val split in threshold mode, from the saved transcoders. Run again, it trains what is
missing and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from matryoshka.metrics import FvuSums
from matryoshka.shards import ShardSet
from matryoshka.sites import apply_convention
from matryoshka.transcoder import Transcoder
from train.config import TrainConfig
from train.progress import Screen
from train.run import TrainResult, train_fleet

BASE = {"input": "normalized", "condition": "centre", "lr": 3e-3, "init": "pairs", "auxk_coef": 1 / 32}


def fleet() -> list[dict[str, Any]]:
    """All inputs under all conditionings; then learning rate x initialisation, and the aux loss, around the base."""
    members = [
        {"input": input_, "condition": condition}
        for input_ in ("resid_mid", "normalized", "mlp_in")
        for condition in ("none", "centre", "standardise")
    ]
    members += [{"lr": lr, "init": init} for lr in (4e-4, 1.5e-3, 3e-3, 6e-3) for init in ("pairs", "tied")]
    members += [{"auxk_coef": coef} for coef in (0.0, 0.125)]
    members += [{"init_scale": 2.0}, {"input": "resid_mid", "condition": "standardise", "lr": 6e-3}]
    unique: dict[str, dict[str, Any]] = {}
    for member in members:
        chosen = BASE | member
        name = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in chosen.values())
        unique.setdefault(name, {"name": name, **chosen})
    return list(unique.values())


def held_out(run: TrainResult, shards: ShardSet) -> list[float]:
    """FVU of every prefix over the val split."""
    assert run.checkpoint is not None
    transcoder = Transcoder.load(run.checkpoint)
    sums = FvuSums()
    for block in shards.val.blocks():
        for source, target in zip(*(rows.split(4096) for rows in block.rows()), strict=True):
            x = apply_convention(
                source, transcoder.config.input, source_site=transcoder.config.source_site, norm=shards.norm
            )
            y = target.float()
            nested = transcoder.nested(transcoder.encode(x), x=x)
            sums.add(y, torch.stack([(y_hat - y).square().sum(1) for y_hat in nested]))
    return sums.value()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--group-sizes", default="288,576,1152,2592")
    parser.add_argument("--k", type=int, default=32)
    options = parser.parse_args()
    shards = ShardSet.open(options.shards)
    config = TrainConfig.model_validate(
        {
            "shards": options.shards,
            "out": options.out,
            "group_sizes": options.group_sizes,
            "k": options.k,
            "steps": options.steps,
            "batch_tokens": options.batch_tokens,
            "fleet": fleet(),
        }
    )
    with Screen() as screen:
        result = train_fleet(config, screen)
    if result.stopped_by is not None:
        raise SystemExit("stopped; run it again to go on")
    rows = []
    for run in result.runs:
        settings = json.loads((run.path / "run.json").read_text())["config"]
        chosen = [settings[key] for key in (*BASE, "init_scale")]
        if run.outcome == "parked":
            rows.append((float("inf"), [*chosen, "parked", ""]))
            continue
        fvu = held_out(run, shards)
        last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
        numbers = [f"{value:.3f}" for value in fvu] + [f"{100 * last['dead_share']:.0f}%"]
        rows.append((fvu[-1], [*(f"{v:g}" if isinstance(v, float) else v for v in chosen), *numbers]))
    ends = torch.tensor([int(size) for size in options.group_sizes.split(",")]).cumsum(0).tolist()
    header = [*BASE, "init_scale", *(f"FVU {end}" for end in ends), "dead"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for _, row in sorted(rows, key=lambda row: row[0]):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
