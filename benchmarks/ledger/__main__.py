"""Print the ledger."""

from __future__ import annotations

import argparse

import torch

from benchmarks.ledger.fake_step import PHASES, Count, count
from benchmarks.ledger.machines import MACHINES, Machine, host_seconds
from benchmarks.ledger.recipes import recipes

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float16}
"""Precision -> the machines that `auto` takes it on, by the type their matrix units are made for."""


def main() -> None:
    """Print the rates, then each recipe in each precision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description="What a step costs on a GPU.")
    parser.add_argument("--recipes", nargs="+", choices=[r.name for r in recipes()], help="by default all")
    parser.add_argument("--backend", choices=["auto", "sparse", "dense"], default="auto")
    parser.add_argument("--operators", action="store_true", help="list every operator of the step")
    options = parser.parse_args()
    print("Never run on a GPU: counts of operators, divided by these rates.\n")
    print("| GPU | bf16 or fp16, TFLOP/s | fp32, TFLOP/s | memory, TB/s | us a kernel | peaks of the floor |")
    print("|---|---|---|---|---|---|")
    for machine in MACHINES:
        print(_rates(machine))
    for recipe in recipes():
        if options.recipes is None or recipe.name in options.recipes:
            for precision, low in PRECISIONS.items():
                counted = count(recipe, precision=precision, backend=options.backend)
                _print(counted, precision, [machine for machine in MACHINES if machine.low == low])
                if options.operators:
                    _print_operators(counted)


def _rates(machine: Machine) -> str:
    peaks = (machine.peak_low_flops / 1e12, machine.peak_fp32_flops / 1e12, machine.peak_memory / 1e12)
    return (
        f"| {machine.name} | {machine.low_flops / 1e12:g} | {machine.fp32_flops / 1e12:g} | "
        f"{machine.memory / 1e12:g} | {machine.kernel * 1e6:g} | {' / '.join(f'{peak:g}' for peak in peaks)} |"
    )


def _print(counted: Count, precision: str, machines: list[Machine]) -> None:
    recipe, d = counted.recipe, counted.recipe.d
    batch = recipe.config.batch_tokens
    print(
        f"\n### {recipe.name}: d {d:,}, {recipe.d_sae:,} latents, k {recipe.config.k}, batch {batch:,}; "
        f"{precision}, {counted.backend}\n"
    )
    print(f"| | GFLOP | GB | kernels | waits | {' | '.join(f'{m.name}, ms' for m in machines)} |")
    print(f"|---|---|---|---|---|{'---|' * len(machines)}")
    step = [phase for phase in PHASES if phase != "conditioning"]
    for name, phases in [*[(phase, [phase]) for phase in PHASES], ("step, without conditioning", step)]:
        operations = counted.of(*phases)
        cells = [
            f"{sum(o.flops for o in operations) / 1e9:.0f}",
            f"{sum(o.n_bytes for o in operations) / 1e9:.2f}",
            f"{sum(o.n_kernels for o in operations)}",
            f"{sum(o.waits for o in operations)}",
            *[f"{1e3 * machine.seconds(operations):.2f}" for machine in machines],
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    sizes = {"d_in": d, "d_out": d, "d_sae": recipe.d_sae, "batch": batch}
    floors = [machine.floor(**sizes, low=precision != "fp32") for machine in machines]
    print(f"| floor | | | | | {' | '.join(f'{1e3 * floor:.2f}' for floor in floors)} |")
    times = [machine.seconds(counted.training) / floor for machine, floor in zip(machines, floors, strict=True)]
    print(f"| step / floor | | | | | {' | '.join(f'{ratio:.1f}' for ratio in times)} |")
    print(
        f"\n{len(counted.step)} operators, which the host starts in about {1e3 * host_seconds(counted.step):.1f} ms; "
        f"a step that logs waits {sum(o.waits for o in counted.log_step)} times. Peak {counted.step_peak / 1e9:.2f} GB "
        f"in a step and {counted.start_peak / 1e9:.2f} at the start; `train` says {counted.estimated / 1e9:.2f}."
    )


def _print_operators(counted: Count) -> None:
    print("\n| phase | operator | GFLOP | MB | kernels |\n|---|---|---|---|---|")
    for o in counted.step:
        print(f"| {o.phase} | {o.name} | {o.flops / 1e9:.1f} | {o.n_bytes / 1e6:.2f} | {o.n_kernels} |")


if __name__ == "__main__":
    main()
