"""Settings of an evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from matryoshka.config import Config, Count, CountOrZero, Positive, PositiveOrZero, Seed, Share
from matryoshka.locations import LocalPath, Location, Name


def _in_order(scales: tuple[float, ...]) -> tuple[float, ...]:
    if list(scales) != sorted(set(scales), reverse=True):
        raise ValueError(f"give the factors from the largest to the smallest, each once; found {scales}")
    return scales


_OPERATIONAL = frozenset({"shards", "device", "out", "wandb", "wandb_project", "save_minutes"})


Number = Annotated[Count, Field(le=1_000_000)]
"""Of windows, neighbours, words and other things that are kept together in memory."""

Scales = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_in_order)]


class CompareConfig(Config):
    """Settings of `evaluate compare` alone."""

    scales: Scales = (4.0, 3.0, 2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    """Factors on the thresholds; the curve of each transcoder must reach the L0 that is compared at. Must hold 1."""
    l0: tuple[Positive, ...] | None = None
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
    """Which rows to choose from; train only to see what a transcoder memorised."""
    top: Number = 20
    """Windows around the largest activations, at most one of a context."""
    per_decile: Number = 2
    """Windows of each tenth of the activations."""
    random: Number = 5
    """Windows in which the latent does not fire."""
    before: Annotated[int, Field(ge=0, le=500)] = 24
    """Tokens shown before the one that the window is about."""
    after: Annotated[int, Field(ge=0, le=500)] = 15
    """Tokens shown after it."""


class HierarchyConfig(Config):
    """Settings of `evaluate hierarchy` alone."""

    parents: Number = 5
    """Edges kept of each child: its parents in earlier groups of the largest P(parent fires | child fires)."""
    min_lift: PositiveOrZero = 1.0
    """Edges have a lift above this: how much oftener the two fire together than if they were independent."""
    partners: Number = 5
    """Latents listed beside each latent, of any group, by the phi coefficient of firing together."""
    min_rows: Number = 10
    """Pairs that fire together on fewer rows are in no table: their shares would be noise."""
    top_tokens: Number = 20
    """Tokens listed of each group: those where it explains most."""
    clusters: bool = True
    """Whether decoder directions are laid out and clustered; needs the extra `structure`."""
    neighbours: Annotated[Number, Field(ge=2)] = 15
    """Nearest decoder directions of each that the layout keeps together (UMAP's n_neighbors)."""
    min_cluster_size: Annotated[Number, Field(ge=2)] = 10
    """Smaller groups of directions are no cluster (HDBSCAN's min_cluster_size)."""


class LmConfig(Config):
    """The language model, for the commands that run it: faithfulness, logits, ablate and steer."""

    model: Name | None = None
    """Folder or hub name, where it is another place than at the harvest; by default what the shard set names."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of its weights; by default that of the harvest."""
    batch_tokens: Count = 2048
    """Tokens that go through it at once (whole contexts, at least one); twice their logits are held."""


class FaithfulnessConfig(Config):
    """Settings of `evaluate faithfulness` alone."""

    tokens: Count | None = 20_000
    """Rows to use, in whole contexts, the first ones; null is all of the split. The default takes minutes on a CPU with
    a model of some 100M parameters; it prints what to expect before it starts."""


class LogitsConfig(Config):
    """Settings of `evaluate logits` alone."""

    top: Number = 10
    """Tokens kept of each latent, on either side."""
    scale_tokens: Count = 4096
    """Val rows over which the median scale of the final norm is taken, the first ones, in whole contexts."""


class AblateConfig(Config):
    """Settings of `evaluate ablate` alone."""

    contexts: Number = 64
    """Contexts that each latent is ablated in, drawn among those where it fires."""
    top: Number = 10
    """Tokens kept, on either side."""


class AbsorptionConfig(Config):
    """Settings of `evaluate absorption` alone. The defaults that SAEBench has too are SAEBench's."""

    per_word: Number = 4
    """Occurrences used of each word, the first ones."""
    max_words: Number = 10_000
    """Words used at most on either side, chosen by a hash."""
    test_share: Share = 0.2
    """Share of the words that no probe is trained on; their rows are what is scored."""
    train_tokens: Count = 500_000
    """Positions of the train split, the first ones, in which the words of the probes are looked for."""
    readback_tokens: Count = 65_536
    """Rows of those that show what each latent represents at the encoder's own site."""
    probe_c: Positive = 0.01
    """Inverse strength of the probes' L2 penalty, on standardised inputs."""
    min_words: Annotated[Number, Field(ge=2)] = 10
    """A letter needs this many train words and this many test words."""
    min_probe_f1: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """A letter takes part when its probe's test F1 is above this."""
    min_letters: Annotated[int, Field(ge=1, le=26)] = 20
    """Nothing is reported when fewer letters take part."""
    f1_jump: PositiveOrZero = 0.03
    """A letter is split over k latents where the F1 of k is above the best before by more than this."""


class ProbingConfig(Config):
    """Settings of `evaluate probing` alone."""

    sets: tuple[Literal["first_letter", "token_kind", "document_start"], ...] = (
        "first_letter",
        "token_kind",
        "document_start",
    )
    """Label sets that every shard set yields."""
    ks: Annotated[tuple[Number, ...], Field(min_length=1)] = (1, 2, 5, 10, 20)
    """Latents in a probe."""
    train_examples: Number = 2000
    """Rows of a class used to fit, and at most as many of the others."""
    test_examples: Number = 500
    """Rows of a class used to score, and as many of the others."""
    min_examples: Annotated[Number, Field(ge=2)] = 20
    """A class with fewer rows on either side is left out."""
    per_token: Number = 50
    """Rows used at most of one token's text."""
    test_share: Share = 0.2
    """Share of the tokens' texts that are only in the test."""
    train_tokens: Count = 500_000
    """Positions of the train split, the first ones, from which the rows to fit on are drawn."""
    dense_c: Positive = 0.01
    """Inverse strength of the L2 penalty of the probe on the whole input, standardised."""


class EvaluateConfig(Config):
    """Which rows to measure on, and how."""

    shards: Location | None = None
    """Folder of the shard set; by default the one that each run was trained on."""
    split: Literal["val", "train"] = "val"
    """Which rows; train, which the transcoder has seen, only on request, to see what was memorised."""
    prefix: Count | None = None
    """Measure the first so many nested groups alone, as a transcoder of its own; all by default."""
    tokens: Count | None = None
    """Val rows to use, the first ones in reading order, context after context; all by default."""
    batch_rows: Count = 4096
    """Rows measured at once, but in `evaluate run`: it takes batches as large as in training."""
    curve_scales: Scales = (2.0, 1.5, 1.25, 1.0, 0.85, 0.7)
    """Factors on the thresholds for the L0-FVU curve."""
    curve_tokens: CountOrZero = 4096
    """About how many rows the curve is drawn from, every n-th of all (low thresholds cost more than all the rest), n at
    most 16, so that a long pass draws it from more; 0 for no curve."""
    bootstrap: Annotated[CountOrZero, Field(le=1_000_000)] = 1000
    """Draws of documents behind the confidence intervals (of words, in `evaluate absorption`); 0 for none."""
    seed: Seed = 0
    """Seed of those draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    out: LocalPath | None = None
    """Folder of the report; by default eval/<shard set>-<digest> in the run."""
    save_minutes: PositiveOrZero = 5.0
    """A long pass saves its sums as often as this, to go on from there when it is killed."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Whether `evaluate report` also logs its pages to Weights & Biases, as an artifact of a run of its own."""
    wandb_project: str = "matryoshka-transcoders"
    """Project of that run."""

    compare: CompareConfig = CompareConfig()
    """Settings of `evaluate compare`."""
    samples: SamplesConfig = SamplesConfig()
    """Settings of `evaluate samples`."""
    hierarchy: HierarchyConfig = HierarchyConfig()
    """Settings of `evaluate hierarchy`."""
    lm: LmConfig = LmConfig()
    """How the language model is run, where it is."""
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    """Settings of `evaluate faithfulness`."""
    logits: LogitsConfig = LogitsConfig()
    """Settings of `evaluate logits`."""
    ablate: AblateConfig = AblateConfig()
    """Settings of `evaluate ablate`."""
    absorption: AbsorptionConfig = AbsorptionConfig()
    """Settings of `evaluate absorption`."""
    probing: ProbingConfig = ProbingConfig()
    """Settings of `evaluate probing`."""

    def content(self) -> dict[str, Any]:
        """The settings that decide the numbers; the others only where and how fast."""
        sections = {name for name in type(self).model_fields if isinstance(getattr(self, name), Config)}
        return self.model_dump(mode="json", exclude=set(_OPERATIONAL) | sections)
