"""Settings of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from matryoshka.config import Config, Count, parse_count


def _in_order(scales: tuple[float, ...]) -> tuple[float, ...]:
    if list(scales) != sorted(set(scales), reverse=True):
        raise ValueError(f"give the factors from the largest to the smallest, each once; found {scales}")
    return scales


_OPERATIONAL = frozenset({"shards", "device", "out", "compare", "samples"})


Scales = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1), AfterValidator(_in_order)]


class CompareConfig(Config):
    """Settings of `evaluate compare` alone."""

    scales: Scales = (4.0, 3.0, 2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    """Factors on the thresholds; the curve of each transcoder must reach the L0 that is compared at. Must hold 1."""
    l0: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """L0 values to compare at; by default the L0 of the first transcoder at its own threshold."""

    @field_validator("scales")
    @classmethod
    def _own_threshold(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in scales:
            raise ValueError("1.0, the transcoder's own threshold, must be among the factors")
        return scales


class SamplesConfig(Config):
    """Settings of `evaluate samples` alone: how many windows of each latent, and how long."""

    split: Literal["val", "train"] = "val"
    """Which rows to choose from; train only to look at what a transcoder learned by heart."""
    top: Count = 20
    """Windows around the largest activations, at most one of a context."""
    per_decile: Count = 2
    """Windows of each tenth of the activations."""
    random: Count = 5
    """Windows in which the latent does not fire."""
    before: Annotated[int, Field(ge=0, le=500)] = 24
    """Tokens shown before the one that the window is about."""
    after: Annotated[int, Field(ge=0, le=500)] = 15
    """Tokens shown after it."""


class EvaluateConfig(Config):
    """Which rows to measure on, and how."""

    shards: Path | None = None
    """Folder of the shard set; its val split is what is evaluated."""
    tokens: Count | None = None
    """Val rows to use, the first ones in reading order, context after context; all by default."""
    batch_rows: Count = 4096
    """Rows measured at once; BatchTopK chooses among them."""
    curve_scales: Scales = (2.0, 1.5, 1.25, 1.0, 0.85, 0.7)
    """Factors on the thresholds for the L0-FVU curve."""
    curve_tokens: Annotated[int, BeforeValidator(parse_count), Field(ge=0)] = 32_768
    """Rows the curve is drawn from (low thresholds cost more than all the rest); 0 for no curve."""
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    """Draws of contexts behind the confidence intervals; 0 for none."""
    seed: int = 0
    """Seed of those draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    out: Path | None = None
    """Folder of the report; by default eval/<shard set>-<digest> in the run."""

    compare: CompareConfig = CompareConfig()
    """Settings of `evaluate compare`."""
    samples: SamplesConfig = SamplesConfig()
    """Settings of `evaluate samples`."""

    def content(self) -> dict[str, Any]:
        """The settings that decide the numbers; the others only where and how fast."""
        return self.model_dump(mode="json", exclude=set(_OPERATIONAL))
