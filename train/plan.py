"""Everything that a run needs to know before its first step: choices from the config, facts from the shard set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.sites import input_conventions

from .config import TrainConfig, check_group_sizes, default_group_sizes
from .schedule import KSchedule, Schedule

_MAX_WARMUP = 1000
_SHARE = 20
"""Warm-up and the dead window are at most 1/20 of a run when they are not given."""
_K_SHARE = 5
_DEAD_WINDOW = 10_000_000
_MIN_CHECKPOINT_STEPS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The resolved settings of one run."""

    group_sizes: tuple[int, ...]
    n_steps: int
    warmup_steps: int
    decay_steps: int
    input: str
    k_aux: int
    dead_after_tokens: int
    lr: float
    k_start: int
    k_steps: int
    checkpoint_every: int

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return sum(self.group_sizes)

    def content(self) -> dict[str, Any]:
        """The part of the plan that decides the result, JSON-able."""
        content = asdict(self)
        del content["checkpoint_every"]
        return content | {"group_sizes": list(self.group_sizes)}

    def schedule(self, config: TrainConfig) -> Schedule:
        """The learning rate over the run."""
        return Schedule(
            lr=self.lr,
            n_steps=self.n_steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            decay=config.decay,
            floor=config.lr_floor,
        )

    def k_schedule(self, config: TrainConfig) -> KSchedule:
        """k over the run."""
        return KSchedule(start=self.k_start, end=config.k, n_steps=self.k_steps)


def make_plan(config: TrainConfig, shards: ShardSet, n_rows: int) -> Plan:
    """Resolve every default; `n_rows` is the number of rows in an epoch. Raises UserError on what does not fit."""
    group_sizes = config.group_sizes or default_group_sizes(shards.d_in)
    try:
        check_group_sizes(group_sizes, config.d_sae, config.k)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.group_weights is not None and len(config.group_weights) != len(group_sizes):
        raise UserError(
            f"group_weights has {len(config.group_weights)} values for {len(group_sizes)} groups; give one for each"
        )
    n_steps = config.steps or (config.tokens or n_rows) // config.batch_tokens
    if n_steps < 1:
        raise UserError(f"{config.tokens} tokens are fewer than one batch of {config.batch_tokens}; train on more")
    if config.sampled_prefixes is not None and config.sampled_prefixes > sum(group_sizes):
        raise UserError(f"sampled_prefixes = {config.sampled_prefixes} are more than the {sum(group_sizes)} latents")
    conventions = input_conventions(shards.manifest.source.site)
    raw, *derived = conventions
    default_input = "normalized" if derived and shards.norm is not None else raw
    d_sae = sum(group_sizes)
    k_start = config.k_start or config.k
    if k_start > d_sae:
        raise UserError(f"k_start = {k_start} is more than the {d_sae} latents there are; use a smaller one")
    k_steps = 0 if config.k_start is None else n_steps // _K_SHARE if config.k_steps is None else config.k_steps
    if k_steps >= n_steps:
        raise UserError(f"k_steps = {k_steps} leaves no step at k = {config.k}: the run has {n_steps} steps")
    n_trained = n_steps * config.batch_tokens
    warmup = config.warmup_steps
    return Plan(
        group_sizes=group_sizes,
        n_steps=n_steps,
        warmup_steps=min(_MAX_WARMUP, n_steps // _SHARE) if warmup is None else warmup,
        decay_steps=int(config.decay_fraction * n_steps),
        input=config.input or default_input,
        k_aux=min(config.k_aux or 2 * config.k, d_sae),
        dead_after_tokens=config.dead_after_tokens or max(1, min(_DEAD_WINDOW, n_trained // _SHARE)),
        lr=config.lr,
        k_start=k_start,
        k_steps=k_steps,
        checkpoint_every=config.checkpoint_every or max(_MIN_CHECKPOINT_STEPS, n_steps // 10),
    )
