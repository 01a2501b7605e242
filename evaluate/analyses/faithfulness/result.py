"""faithfulness.json: what the language model loses when a transcoder's output replaces the target."""

from __future__ import annotations

from matryoshka.config import Config

from ...measures.bootstrap import Interval
from ...result import Result

WITH_ERROR_FILE = "faithfulness-with-error.json"


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
    """95% bootstrap interval over documents, as the following; null with a single document"""
    ce_recovered_zero_interval: Interval | None
    ce_recovered_mean_interval: Interval | None
    kl_interval: Interval | None


class Faithfulness(Result):
    """The content of faithfulness.json.

    A position is scored when its token is not special and the next token is there, not special and of the same
    document. The target is replaced or ablated at every position whose token is not special, and nowhere else.
    """

    FILE = "faithfulness.json"

    n_contexts: int
    n_documents: int | None = None
    """Documents with scored positions, which the intervals draw; null where it was made when contexts were drawn."""
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
