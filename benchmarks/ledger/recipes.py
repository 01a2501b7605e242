"""The sizes that are counted: those of the recipes, from their files, and a dictionary that is seven times as wide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from matryoshka.config import load_config
from train.config import TrainConfig
from train.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
GEMMA_2_2B = 2304


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run: its settings, and the width of both sites."""

    name: str
    config: TrainConfig
    d: int = GEMMA_2_2B

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents of each group."""
        assert self.config.group_sizes is not None
        return self.config.group_sizes

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return sum(self.group_sizes)

    def plan(self) -> Plan:
        """The resolved settings of a run of 15M rows."""
        n_steps = 15_000_000 // self.config.batch_tokens
        return Plan(
            group_sizes=self.group_sizes,
            n_steps=n_steps,
            warmup_steps=min(1000, n_steps // 20),
            decay_steps=n_steps // 5,
            input="normalized",
            k_aux=self.config.k_aux or 2 * self.config.k,
            dead_after_tokens=self.config.dead_after_tokens or n_steps * self.config.batch_tokens // 20,
            lr=self.config.lr,
            k_start=self.config.k_start or self.config.k,
            k_steps=0,
            checkpoint_every=n_steps // 10,
        )

    def at(self, name: str, **changes: object) -> Recipe:
        """The same with other settings."""
        return replace(self, name=name, config=self.config.model_copy(update=changes))


def recipes() -> tuple[Recipe, ...]:
    """Layer 17 at batches of 4,096 and of 1,024, layers 12 and 8, and 131,072 latents."""
    l17 = _read("layer 17", "pipeline.yaml")
    wide = (8192, 16384, 32768, 73728)
    return (
        l17.at("layer 17", batch_tokens=4096),
        l17.at("layer 17, batch 1,024", batch_tokens=1024),
        _read("layer 12", "examples/gemma2-layer12.yaml").at("layer 12", batch_tokens=4096),
        _read("layer 8", "examples/gemma2-layer8.yaml").at("layer 8", batch_tokens=4096),
        l17.at("131,072 latents", group_sizes=wide, d_sae=sum(wide), batch_tokens=4096),
    )


def _read(name: str, file: str) -> Recipe:
    return Recipe(name, load_config(TrainConfig, "train", file=ROOT / file))
