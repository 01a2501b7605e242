"""faithfulness.json: what the language model loses when a transcoder takes the place of what it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from matryoshka.config import Config

from ..result import ShardSetFacts, TranscoderFacts, identity_of

FAITHFULNESS_FILE = "faithfulness.json"
WITH_ERROR_FILE = "faithfulness-with-error.json"

Interval = tuple[float, float]


class SplicedPrefix(Config):
    """The model with one nested reconstruction in place of the target. Losses in nats a token."""

    prefix: int
    """Number of nested groups."""
    prefix_end: int
    """Number of latents."""
    l0: float
    """mean number of active latents at a scored position"""
    ce_loss_spliced: float
    ce_increase: float
    """ce_loss_spliced - ce_loss_clean"""
    ce_recovered_zero: float | None
    """(ce_loss_ablated_zero - ce_loss_spliced) / (ce_loss_ablated_zero - ce_loss_clean); null where the ablation does
    no harm"""
    ce_recovered_mean: float | None
    """the same with ce_loss_ablated_mean"""
    kl: float
    """mean of KL(clean || spliced)"""
    top1_agreement: float
    """share of positions where both models hold the same token most likely"""
    ce_increase_interval: Interval | None
    """95% bootstrap interval over contexts, as the following; null with a single context"""
    ce_recovered_zero_interval: Interval | None
    ce_recovered_mean_interval: Interval | None
    kl_interval: Interval | None


class Faithfulness(Config):
    """The content of faithfulness.json.

    A position is scored when its token is not special and the next token is there, not special and of the same
    document. The target is replaced or ablated at every position whose token is not special, and nowhere else.
    """

    format_version: Literal[1] = 1
    transcoder: TranscoderFacts
    shard_set: ShardSetFacts
    settings: dict[str, Any]
    n_contexts: int
    n_tokens: int
    """Scored positions."""
    ce_loss_clean: float
    ce_loss_ablated_zero: float
    """with the target set to 0"""
    ce_loss_ablated_mean: float
    """with the target set to its mean over the train rows of the shard set"""
    kl_ablated_zero: float
    kl_ablated_mean: float
    prefixes: tuple[SplicedPrefix, ...]

    def identity(self) -> dict[str, Any]:
        """What decides every number here."""
        return identity_of(self.transcoder, self.shard_set, self.settings)


def read_faithfulness(path: Path) -> Faithfulness | None:
    """The record at `path`; None when there is none that this version can read."""
    try:
        return Faithfulness.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
