"""The choices that decide a short run, compared at equal steps on real activations: one fleet for a layer, one table.

    python -m benchmarks.ablation --fleet close-calls --layers 8 15 24                    all from one forward pass
    python -m benchmarks.ablation --shards data/demo/l15                                  a set that is there already

Held-out FVU is that of the whole val split in threshold mode, from the saved transcoders. `alive` is the share of
latents that fire on it, `dead` the share that training counted as dead at its end, `s/step` the median time of a step
of that run alone. Run again, it goes on, trains what is missing and prints the tables. On two cores without other work
SmolLM2-135M takes about 1300 tokens a second through 25 layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from matryoshka.metrics import FvuSums
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder
from train.config import TrainConfig
from train.member import Member
from train.progress import TrainDisplay
from train.result import TrainResult
from train.run import train_fleet

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {"input": "normalized", "condition": "centre", "lr": 3e-3, "init": "pairs", "auxk_coef": 1 / 8}

OLD_AUX: dict[str, Any] = {"k_aux": "d_in / 2", "auxk_coef": 1 / 32}
"""The aux loss of Gao et al. 2024, the default until these tables were made."""


def choices() -> list[dict[str, Any]]:
    """All inputs under all conditionings; then learning rate x initialisation, and the aux loss, around the base."""
    members = [
        {"input": input_, "condition": condition}
        for input_ in ("resid_mid", "normalized", "mlp_in")
        for condition in ("none", "centre", "standardise")
    ]
    members += [{"lr": lr, "init": init} for lr in (4e-4, 1.5e-3, 3e-3, 6e-3) for init in ("pairs", "tied")]
    return [*members, {"auxk_coef": 0.0}, {"auxk_coef": 1 / 32}]


def close_calls() -> list[dict[str, Any]]:
    """What the other tables could not decide, each with three seeds: the spread of a row is what seeds alone do."""
    members = [{}, OLD_AUX, {"lr": 1.5e-3}, {"condition": "standardise"}, {"input": "mlp_in"}]
    return [member | {"seed": seed} for member in members for seed in (0, 1, 2)]


def long() -> list[dict[str, Any]]:
    """The same for a pass over all of a set, where dead latents have time to come back by themselves; one seed."""
    members: list[dict[str, Any]] = [{}, OLD_AUX, {"auxk_coef": 0.0}, {"lr": 1.5e-3}]
    return [*members, {"condition": "standardise"}, {"input": "mlp_in"}]


def aux() -> list[dict[str, Any]]:
    """The aux loss: how many dead latents rebuild a residual, and how much that weighs. Many of them cost time."""
    members: list[dict[str, Any]] = [{"auxk_coef": 0.0}]
    for k_aux in ("d_in / 2", "4 k", "2 k", "k"):
        members += [{"k_aux": k_aux, "auxk_coef": coef} for coef in (1 / 32, 1 / 8)]
    return members


def prefixes() -> list[dict[str, Any]]:
    """Prefixes in the loss: those of the groups, or drawn anew at each step."""
    return [OLD_AUX | member for member in ({}, {"sampled_prefixes": 4}, {"sampled_prefixes": 10})]


FLEETS = {"choices": choices, "close-calls": close_calls, "long": long, "aux": aux, "prefixes": prefixes}


def fleet(kind: str, *, k: int, d_in: int) -> list[dict[str, Any]]:
    """The members with their names, those that are equal once."""
    sizes = {"d_in / 2": d_in // 2, "4 k": 4 * k, "2 k": 2 * k, "k": k}
    unique: dict[str, dict[str, Any]] = {}
    for member in FLEETS[kind]():
        chosen = BASE | member
        if "k_aux" in chosen:
            chosen["k_aux"] = sizes[chosen["k_aux"]]
        name = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in chosen.values())
        unique.setdefault(name, {"name": name, **chosen})
    return list(unique.values())


def harvest(options: argparse.Namespace) -> list[Path]:
    """All layers from one forward pass, or what is missing of them."""
    out = options.out / "sets"
    command = [sys.executable, "-m", "harvest", "run", "--model", options.model.resolve(), "--dataset"]
    command += [options.text.resolve(), "--layers", ",".join(map(str, options.layers)), "--tokens", options.tokens]
    command += ["--ctx-len", 256, "--set", "harvest.val_fraction=0.1", "--out", (out / "l{layer}").resolve()]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    return [out / f"l{layer}" for layer in options.layers]


def held_out(run: TrainResult, shards: ShardSet) -> tuple[list[float], float]:
    """FVU of every prefix over the val split, and the share of latents that fire on it."""
    assert run.checkpoint is not None
    transcoder = Transcoder.load(run.checkpoint)
    sums, fired = FvuSums(), torch.zeros(transcoder.config.d_sae, dtype=torch.bool)
    for block in shards.val.blocks():
        for source, target in zip(*(rows.split(4096) for rows in block.rows()), strict=True):
            x = apply_convention(
                source, transcoder.config.input, source_site=transcoder.config.source_site, norm=shards.norm
            )
            y, acts = target.float(), transcoder.encode(x)
            fired |= (acts > 0).any(0)
            sums.add(y, torch.stack([(y_hat - y).square().sum(1) for y_hat in transcoder.nested(acts, x=x)]))
    return sums.value(), float(fired.double().mean())


class StepTimes:
    """Seconds of each member's steps; those of an earlier command are on the disk beside its run."""

    def __init__(self) -> None:
        self._seconds: dict[Path, list[float]] = defaultdict(list)
        self._take = Member.take

    def __enter__(self) -> StepTimes:
        times = self

        def timed(self: Member, *arguments: Any) -> Any:
            start = time.perf_counter()
            report = times._take(self, *arguments)
            times._seconds[self.planned.folder].append(time.perf_counter() - start)
            return report

        Member.take = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Member.take = self._take  # type: ignore[method-assign]
        for folder, seconds in self._seconds.items():
            (folder / "step-seconds.json").write_text(json.dumps(statistics.median(seconds)), encoding="utf-8")


def train_all(options: argparse.Namespace, shards: ShardSet, path: Path) -> list[TrainResult]:
    """The fleet on one set."""
    settings = {
        "shards": path,
        "out": options.out / f"{options.fleet}-{shards.name}",
        "group_sizes": options.group_sizes,
        "k": options.k,
        "steps": options.steps,
        "batch_tokens": options.batch_tokens,
        "fleet": fleet(options.fleet, k=options.k, d_in=shards.d_in),
    }
    with TrainDisplay() as screen, StepTimes():
        result = train_fleet(TrainConfig.model_validate(settings), screen)
    if result.stopped_by is not None:
        raise SystemExit("stopped; run it again to go on")
    return list(result.runs)


def table(options: argparse.Namespace, runs: list[TrainResult], shards: ShardSet) -> None:
    """One row for each setting, its seeds together: mean, and half the range where there are several."""
    members = fleet(options.fleet, k=options.k, d_in=shards.d_in)
    varied = sorted({key for member in members for key in member} - {*BASE, "name", "seed"})
    rows: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    for run in runs:
        settings = json.loads((run.path / "run.json").read_text())
        values = [(settings["config"] | {"k_aux": settings["identity"]["plan"]["k_aux"]})[k] for k in (*BASE, *varied)]
        row = rows[tuple(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
        if run.outcome == "diverged":
            row.append([])
            continue
        fvu, alive = held_out(run, shards)
        last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
        row.append([*fvu, alive, last["dead_share"], json.loads((run.path / "step-seconds.json").read_text())])
    ends = torch.tensor([int(size) for size in options.group_sizes.split(",")]).cumsum(0).tolist()
    header = [*BASE, *varied, *(f"FVU {end}" for end in ends), "alive", "dead", "s/step"]
    n_steps = runs[0].n_steps
    print(f"\n### {shards.name}: {n_steps} steps of {options.batch_tokens} rows\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))

    def width(item: tuple[tuple[str, ...], list[list[float]]]) -> float:
        return statistics.mean(one[len(ends) - 1] if one else float("inf") for one in item[1])

    for chosen, seeds in sorted(rows.items(), key=width):
        cells = list(chosen)
        if not all(seeds):
            cells += ["diverged"] + [""] * (len(ends) + 2)
        else:
            for number, column in enumerate(zip(*seeds, strict=True)):
                share = number in (len(ends), len(ends) + 1)
                cell = f"{100 * statistics.mean(column):.0f}%" if share else f"{statistics.mean(column):.3f}"
                if len(column) > 1 and number < len(ends):
                    cell += f" +-{(max(column) - min(column)) / 2:.3f}"
                cells.append(cell)
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", choices=FLEETS, default="choices")
    parser.add_argument("--shards", type=Path, nargs="+", help="sets that are there; nothing is harvested")
    parser.add_argument("--model", type=Path, default=Path("data/demo/inputs/model"))
    parser.add_argument("--text", type=Path, default=Path("data/demo/inputs/text"))
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15, 24])
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--out", type=Path, default=Path("data/ablation"))
    parser.add_argument("--steps", type=int, help="by default one epoch")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--group-sizes", default="144,288,576,1296")
    parser.add_argument("--k", type=int, default=32)
    options = parser.parse_args()
    began = time.monotonic()
    paths = options.shards or harvest(options)
    print(f"caching took {time.monotonic() - began:.0f} s", flush=True)
    for path in paths:
        began, shards = time.monotonic(), ShardSet.open(path)
        runs = train_all(options, shards, path)
        table(options, runs, shards)
        print(f"\n{len(runs)} runs took {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
