"""Settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from matryoshka.config import Config, Count, CountOrZero, Positive, PositiveOrZero, Seed, Sizes
from matryoshka.locations import LocalPath, Location

_OPERATIONAL = frozenset(
    {
        "shards",
        "out",
        "fleet",
        "grid",
        "parallel",
        "readers",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "log_every",
        "wandb",
        "wandb_project",
        "device",
        "precision",
        "backend",
    }
)
"""Settings that change how a run is carried out, not what it computes but for rounding; a resumed run may change them.
What they come to is in the sessions of run.json."""

_RESOLVED = frozenset(
    {
        "group_sizes",
        "d_sae",
        "steps",
        "tokens",
        "lr",
        "warmup_steps",
        "decay_fraction",
        "input",
        "k_aux",
        "dead_after_tokens",
        "k_start",
        "k_steps",
    }
)
"""Settings that the plan of a run resolves: a default and the same value written out are the same run."""

DEFAULT_EXPANSION = 8
DEFAULT_FRACTIONS = (16, 8, 4)
"""The first groups are d_sae/16, d_sae/8 and d_sae/4; the last has the rest. At d_in = 2304 this is the layer-17
recipe: 1152, 2304, 4608, 10368."""


class TrainConfig(Config):
    """What to learn from a shard set. The facts (widths, sites, model) come from the set itself."""

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "group_sizes": ("d_sae", "group_weights"),
        "steps": ("tokens",),
        "tokens": ("steps",),
        "group_weights": ("sampled_prefixes",),
        "sampled_prefixes": ("group_weights",),
    }
    GONE: ClassVar[Mapping[str, str]] = {
        "init_scale": "the encoder starts at scale 1, since 2 was worse in every layer measured; leave it out",
        "lr_d_sae": "give the lr of this width itself: lr x sqrt(lr_d_sae / d_sae)",
    }

    shards: Location | None = None
    """Folder of the shard set."""
    out: LocalPath | None = None
    """Folder of the run; by default runs/<shard set>-k<k> beside the shard set, of a fleet runs/<shard set>-fleet."""
    fleet: tuple[dict[str, Any], ...] | None = None
    """Several runs from one stream: for each the settings in which it differs from the rest, and maybe a name."""
    grid: dict[str, list[Any]] | None = None
    """Several runs from one stream: setting -> values, every combination of them (for each entry of fleet)."""
    parallel: Literal["configs", "data", "features"] = "configs"
    """Under torchrun, what is spread over the ranks: the runs of the fleet, the rows of every batch, or the latents of
    every dictionary, for one that does not fit into the memory of one device."""
    group_sizes: Sizes | None = None
    """Latents of each nested group (not cumulative); by default 8 x d_in latents in 4 groups: 1/16, 1/8, 1/4, rest."""
    d_sae: Count | None = None
    """Total number of latents; only checked against the sum of group_sizes."""
    group_weights: tuple[Positive, ...] | None = None
    """Weight of each prefix in the loss; 1/G each by default."""
    sampled_prefixes: Count | None = None
    """Prefixes in the loss drawn anew for each step, the full width among them, in place of those of group_sizes, which
    are still measured; off by default. 10 in Nabeshima's Matryoshka SAEs."""
    k: Count = 96
    """Mean number of active latents in a row (BatchTopK keeps k x batch_tokens in a batch)."""
    k_start: Count | None = None
    """k of the first step, from which it goes to k in equal steps over k_steps; k itself by default."""
    k_steps: CountOrZero | None = None
    """Steps over which k goes from k_start to k; a fifth of the run by default."""
    steps: Count | None = None
    """Optimizer steps; give this or tokens."""
    tokens: Count | None = None
    """Rows to train on (several epochs if more than there are); by default every train row once."""
    batch_tokens: Count = 1024
    """Rows in one optimizer step."""
    buffer_tokens: Count = 131_072
    """Rows held in memory to be shuffled; more mixes documents better."""
    readers: Annotated[Count, Field(le=1024)] = 1
    """Threads that read ahead; the batches do not depend on it."""
    lr: Positive = 4e-4
    """Peak learning rate of Adam."""
    warmup_steps: CountOrZero | None = None
    """Steps from 0 to lr, linear; by default 1000, but at most a twentieth of the run."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Last share of the run in which lr falls."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of that fall, to lr_floor x lr."""
    lr_floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of lr."""
    input: str | None = None
    """What the transcoder reads: the raw source site (resid_mid), normalized, or mlp_in. By default normalized where
    the set stores a norm, else raw."""
    condition: Literal["none", "centre", "standardise"] = "centre"
    """Fixed affine map of the input, folded into the weights on save."""
    init: Literal["pairs", "tied"] = "pairs"
    """pairs: latent i starts from a random training pair. tied: random unit decoder rows, encoder their transpose."""
    skip: bool = False
    """Add an affine path from input to output (skip transcoder)."""
    auxk_coef: PositiveOrZero = 1 / 8
    """Weight of the loss that revives dead latents; 0 turns it off."""
    k_aux: Count | None = None
    """Dead latents that rebuild the residual of a row; 2 k by default."""
    dead_after_tokens: Count | None = None
    """Rows without firing after which a latent is dead; 10M, but at most a twentieth of the run, by default."""
    max_norm: Positive | None = None
    """Leave out rows whose source norm is more than this many times the median (attention sinks); off by default."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""
    threshold_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the smallest kept activation."""
    calibration_tokens: Count = 65_536
    """Train rows that a draw by order_seed sets aside, in whole contexts and at most a twentieth of all, but always
    one context: no step sees them, and on them the threshold is set after training, so that mean L0 is k there. Of a
    tiny set it is that one context, and L0 on val strays the further from k."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the encoder product looks for candidates in; fp32 decides among them, and the weights are always fp32. fp16
    is for GPUs without bf16 (a CPU takes fp32 for it)."""
    backend: Literal["auto", "sparse", "dense"] = "auto"
    """How a step is computed; the result is the same."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; a tenth of the run, at least 100, by default."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay."""
    keep_every: Count | None = None
    """Checkpoints whose step is a multiple of this stay for good; none by default."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    seed: Seed = 0
    """Seed of the initial weights."""
    order_seed: Seed = 0
    """Seed of the order of the rows, which all runs of a fleet share."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases as a second place for the metrics."""
    wandb_project: str = "matryoshka-transcoders"
    """W&B project."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give steps or tokens, not both")
        if self.d_sae is not None and self.group_sizes is None:
            raise ValueError("d_sae alone says nothing of the groups; give group_sizes too")
        if self.group_sizes is not None:
            check_group_sizes(self.group_sizes, self.d_sae, self.k)
        if self.sampled_prefixes is not None and self.group_weights is not None:
            raise ValueError("group_weights are those of the fixed prefixes; give them or sampled_prefixes, not both")
        if self.k_steps is not None and self.k_start is None:
            raise ValueError("k_steps says how long k changes; give k_start too, the k of the first step")
        return self

    def content(self) -> dict[str, Any]:
        """The settings that decide the result beside the plan, which says what the others come to."""
        return self.model_dump(mode="json", exclude=set(_OPERATIONAL | _RESOLVED))


def check_group_sizes(group_sizes: tuple[int, ...], d_sae: int | None, k: int) -> None:
    """Raise ValueError when the groups do not make up d_sae, look cumulative, or the first cannot hold k latents."""
    total = sum(group_sizes)
    if d_sae is not None and total != d_sae:
        hint = ""
        if group_sizes[-1] == d_sae:
            disjoint = [b - a for a, b in zip((0, *group_sizes), group_sizes, strict=False)]
            hint = (
                f": this looks like a cumulative list of prefix ends; the sizes would be {','.join(map(str, disjoint))}"
            )
        else:
            hint = ", the size of each group alone; a cumulative list of prefix ends is the likely cause"
        raise ValueError(f"group_sizes {','.join(map(str, group_sizes))} sum to {total}, not to d_sae = {d_sae}{hint}")
    if k > group_sizes[0]:
        raise ValueError(
            f"k = {k} is larger than the first prefix of {group_sizes[0]} latents allows: a row cannot have more "
            "active latents than there are. Use a smaller k or a larger first group"
        )


def default_group_sizes(d_in: int) -> tuple[int, ...]:
    """8 x d_in latents in 4 groups: 1/16, 1/8, 1/4 and the rest."""
    d_sae = DEFAULT_EXPANSION * d_in
    first = tuple(d_sae // fraction for fraction in DEFAULT_FRACTIONS)
    return (*first, d_sae - sum(first))
