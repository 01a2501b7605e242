"""Print which widths and batch sizes train within a GPU's memory: python examples/memory_table.py --gb 15.

Estimated by the same function that refuses a run that does not fit (train/memory.py); nothing is measured here.
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch

from train.config import TrainConfig
from train.memory import member_estimate
from train.plan import Plan

MODELS = {"SmolLM2-135M": 576, "GPT-2": 768, "Gemma-3-1B": 1152, "Llama-3.2-1B": 2048, "Gemma-2-2B": 2304}
EXPANSIONS = (8, 16, 32, 64)
BATCHES = (2048, 4096, 8192)


def gigabytes(d: int, d_sae: int, batch: int, precision: Literal["bf16", "fp16"]) -> float:
    """Of one run on a GPU, in 10^9 bytes."""
    groups = (d_sae // 16, d_sae // 8, d_sae // 4, d_sae - d_sae // 16 - d_sae // 8 - d_sae // 4)
    config = TrainConfig(group_sizes=groups, k=96, batch_tokens=batch, precision=precision)
    plan = Plan(
        group_sizes=groups,
        n_steps=1000,
        warmup_steps=50,
        decay_steps=200,
        input="normalized",
        k_aux=192,
        dead_after_tokens=10_000_000,
        lr=4e-4,
        k_start=96,
        k_steps=0,
        checkpoint_every=100,
    )
    need = member_estimate(config, plan, d_in=d, d_out=d, device=torch.device("cuda"))
    return (need.held + need.step) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=15.0, help="free memory of the GPU, in 10^9 bytes; a T4 has 15")
    parser.add_argument(
        "--precision",
        choices=["fp16", "bf16"],
        default="fp16",
        help="what auto takes: fp16 on a T4, bf16 from an A100 on",
    )
    options = parser.parse_args()
    free = options.gb
    print(f"| model | width | latents | {' | '.join(f'batch {batch:,}' for batch in BATCHES)} |")
    print(f"|---|---|---|{'---|' * len(BATCHES)}")
    for model, d in MODELS.items():
        for expansion in EXPANSIONS:
            sizes = [gigabytes(d, expansion * d, batch, options.precision) for batch in BATCHES]
            cells = " | ".join(f"{size:.1f} GB" if size <= free else "-" for size in sizes)
            print(f"| {model} | {d:,} | {expansion * d:,} | {cells} |")


if __name__ == "__main__":
    main()
