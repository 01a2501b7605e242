"""What a training step costs on a GPU, without one: `python -m benchmarks.ledger`.

The CUDA branch of `train` runs on fake tensors at the sizes of the recipes. Its operators, their FLOP and bytes, the
places where the host waits, and the memory at the peak are counted, not estimated; times are those counts divided by
the rates of machines.py, arithmetic on paper. What the counts leave out: scratch inside an operator (cuBLAS takes 32
MB), holes in the allocator's memory, caches, and whatever makes a kernel slower than its bytes and FLOP.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.ledger.fake_step import PHASES, Count, count
from benchmarks.ledger.machines import MACHINES, Machine, host_seconds
from benchmarks.ledger.recipes import recipes

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What `auto` takes, by the type that a machine's matrix units are made for."""


def main() -> None:
    """Print the rates, each recipe in each precision, and all of them together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description="What a step costs on a GPU.")
    parser.add_argument("--recipes", nargs="+", choices=[r.name for r in recipes()], help="by default all")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp16", "fp32"], default=["bf16", "fp16"])
    parser.add_argument("--backend", choices=["auto", "sparse", "dense"], default="auto")
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.05], help="shares of dead latents")
    parser.add_argument("--operators", action="store_true", help="list every operator of each step")
    parser.add_argument("--short", action="store_true", help="the rates and the last table alone")
    options = parser.parse_args()
    print("Never run on a GPU: counts of operators, divided by these rates.\n")
    print("| GPU | bf16 or fp16, TFLOP/s | fp32, TFLOP/s | memory, TB/s | us a kernel | peaks of the floor |")
    print("|---|---|---|---|---|---|")
    for machine in MACHINES:
        print(_rates(machine))
    lines = []
    for recipe in recipes():
        if options.recipes is not None and recipe.name not in options.recipes:
            continue
        for precision in options.precisions:
            machines = [m for m in MACHINES if m.low == PRECISIONS.get(precision, m.low)]
            for share in options.dead:
                counted = count(recipe, precision=precision, backend=options.backend, dead_share=share)
                lines += [_line(counted, share, machine) for machine in machines]
                if not options.short:
                    _print(counted, share, machines)
                if options.operators:
                    _print_operators(counted)
    print("\n### All, conditioning of the batch aside\n")
    print("| recipe | dead | GPU | precision, backend | kernels | waits | peak, GB | floor, ms | step, ms | x floor |")
    print(f"|{'---|' * 10}")
    print("\n".join(lines))


def _rates(machine: Machine) -> str:
    peaks = (machine.peak_low_flops / 1e12, machine.peak_fp32_flops / 1e12, machine.peak_memory / 1e12)
    return (
        f"| {machine.name} | {machine.low_flops / 1e12:g} | {machine.fp32_flops / 1e12:g} | "
        f"{machine.memory / 1e12:g} | {machine.kernel * 1e6:g} | {' / '.join(f'{peak:g}' for peak in peaks)} |"
    )


def _floor(counted: Count, machine: Machine) -> float:
    recipe = counted.recipe
    sizes = {"d_in": recipe.d, "d_out": recipe.d, "d_sae": recipe.d_sae, "batch": recipe.config.batch_tokens}
    return machine.floor(**sizes, low=counted.precision != "fp32")


def _line(counted: Count, share: float, machine: Machine) -> str:
    floor, step = _floor(counted, machine), machine.seconds(counted.training)
    cells = [
        counted.recipe.name,
        f"{share:.0%}",
        machine.name,
        f"{counted.precision}, {counted.backend}",
        f"{sum(o.n_kernels for o in counted.training)}",
        f"{sum(o.waits for o in counted.step)}",
        f"{counted.step_peak / 1e9:.2f}",
        f"{1e3 * floor:.2f}",
        f"{1e3 * step:.1f}",
        f"{step / floor:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _print(counted: Count, share: float, machines: list[Machine]) -> None:
    recipe = counted.recipe
    print(
        f"\n### {recipe.name}: d {recipe.d:,}, {recipe.d_sae:,} latents, {share:.0%} dead, k {recipe.config.k}, batch "
        f"{recipe.config.batch_tokens:,}; {counted.precision}, {counted.backend}\n"
    )
    print(f"| | GFLOP | GB | kernels | waits | {' | '.join(f'{m.name}, ms' for m in machines)} |")
    print(f"|{'---|' * (5 + len(machines))}")
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
    floors = [_floor(counted, machine) for machine in machines]
    print(f"| floor | | | | | {' | '.join(f'{1e3 * floor:.2f}' for floor in floors)} |")
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
