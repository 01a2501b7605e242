"""ablations/<latent>.json: what scaling one latent, by default to nothing, does to the model's predictions."""

from __future__ import annotations

from matryoshka.config import Config

from ...measures.bootstrap import Interval
from ...result import Result

ABLATIONS_FOLDER = "ablations"


class TokenChange(Config):
    """A token and how its log-probability changes, in nats, on average over the positions where the latent fires."""

    token: int
    text: str
    effect: float


class Ablation(Result):
    """The content of the file; numbers are null where the latent fires at no scored position.

    The target is changed at all positions of a context at once where the latent fires; the error of the transcoder
    stays: target + (scale - 1) * act * W_dec[latent]. Scored positions are those of faithfulness.json.
    """

    latent: int
    scale: float
    """What its activation is multiplied with."""
    n_contexts_firing: int
    """Contexts in which it fires, of the rows that were looked at."""
    n_contexts: int
    """Contexts it was ablated in."""
    n_documents: int | None = None
    """Documents that have such positions, which the interval draws; null where it was made when contexts were drawn."""
    n_positions: int
    """Scored positions in them at which it fires."""
    mean_act: float | None
    """at these positions"""
    loss_change: float | None
    """mean change of -log p(next token) at these positions, nats"""
    kl: float | None
    """mean of KL(clean || changed) at these positions, nats"""
    top1_changed: float | None
    """share of these positions where another token becomes the most likely one"""
    n_later: int
    """Scored positions at which it does not fire, after one where it does"""
    loss_change_later: float | None
    """mean change of the loss there, which attention carries"""
    kl_later: float | None
    loss_change_interval: Interval | None
    """95% bootstrap interval of loss_change over documents"""
    raised: tuple[TokenChange, ...]
    """tokens that become more likely, the strongest first"""
    lowered: tuple[TokenChange, ...]
