"""Your own text through the language model and the transcoder, for the pages of `evaluate serve`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from matryoshka.checkpoints import Checkpoint
from matryoshka.config import Config
from matryoshka.errors import UserError

from ..analysis import load_transcoder
from ..config import EvaluateConfig
from ..result import TranscoderFacts
from ..rows.token_text import visible
from ..subject.latents import check_latents
from ..subject.shard_set import open_shards

if TYPE_CHECKING:
    from ..language_model.text_probe import TextProbe

MAX_TOKENS = 1024
"""Longer texts would make a page of their own, and with many latents a tensor of gigabytes."""
N_LATENTS = 48
"""Strongest latents that are listed of each token."""
MAX_PROMPT = 256
"""Tokens of a text that is continued: all of it runs again for each new one."""
N_WRITTEN = 30
"""Tokens that it writes."""


class Change(Config):
    """What a page asks: how the model continues a text with one latent changed."""

    latent: Annotated[int, Field(ge=0, strict=True)]
    text: str
    how: Literal["steer", "ablate"]
    """steer: `strength` times its largest activation is added to every token; ablate: where it fires, its activation is
    multiplied with `strength`."""
    strength: Annotated[float, Field(ge=-1000, le=1000)]


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise UserError where the memory of the device ends, so that the page can say so."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the memory of the device is not enough for this text; shorten it, or serve with --device cpu"
        ) from error


class LiveText:
    """Loads the language model when the first text comes, which takes seconds, and keeps it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        facts: TranscoderFacts,
        config: EvaluateConfig,
        max_acts: Callable[[], Sequence[float]],
    ) -> None:
        """`facts`: the weights that the pages are about, which `checkpoint` must still be; `max_acts`: the largest
        activation of each latent on held-out rows."""
        self._checkpoint, self._facts, self._config = checkpoint, facts, config
        self._max_acts = max_acts
        self._probe: TextProbe | None = None

    def tokens(self, text: str) -> dict[str, Any]:
        """{"tokens": [{"text": ..., "latents": [[latent, activation], ...]}, ...]}, the strongest latents first.

        Raises UserError when the text or the model is not available.
        """
        probe = self._probe_for(text, MAX_TOKENS)
        found = probe.top_latents(text, N_LATENTS)
        return {
            "tokens": [
                {
                    "text": visible(token["token"]),
                    "latents": [[fires["latent"], float(f"{fires['act']:.5g}")] for fires in token["latents"]],
                }
                for token in found
            ]
        }

    def changed(self, asked: Change) -> dict[str, Any]:
        """{"prompt": ..., "plain": ..., "changed": ..., "max_act": ...}: how the text continues, the most likely token
        each time, without and with the change.

        Raises UserError when the text or the model is not available, and for a latent that never fires.
        """
        from ..analyses.steer.steer import Writing, adding, continuation, scaling

        check_latents(sum(self._facts.config["group_sizes"]), [asked.latent])
        max_act = self._max_acts()[asked.latent]
        if asked.how == "steer" and max_act == 0:
            raise UserError(f"latent {asked.latent} fires on no held-out row, so that there is no scale for it")
        probe, writing = self._probe_for(asked.text, MAX_PROMPT), Writing(N_WRITTEN)
        tokens = probe.tokens(asked.text)
        if asked.how == "steer":
            during = adding(asked.strength * max_act * probe.transcoder.W_dec[asked.latent], probe)
        else:
            during = scaling(asked.latent, asked.strength, probe)
        return {
            "prompt": visible(asked.text),
            "plain": visible(continuation(probe.model, tokens, writing)),
            "changed": visible(continuation(probe.model, tokens, writing, during)),
            "max_act": float(f"{max_act:.5g}"),
        }

    def _probe_for(self, text: str, most: int) -> TextProbe:
        """The probe, for a text that has tokens and not more than `most`."""
        if not text.strip():
            raise UserError("there is no text to try; type a few words")
        if self._probe is None:
            self._probe = self._load()
        n_tokens = self._probe.tokens(text).shape[1]
        if n_tokens > most:
            raise UserError(f"the text has {n_tokens:,} tokens, and {most:,} can be taken here; shorten it")
        return self._probe

    def _load(self) -> TextProbe:
        from ..language_model.load import load_model
        from ..language_model.text_probe import TextProbe

        shards = open_shards(self._checkpoint, self._config.shards, lambda _: None)
        if self._checkpoint.sha256 != self._facts.sha256:
            raise UserError("the run was trained on since these pages were made; make them again")
        n_groups = len(self._facts.config["group_sizes"])
        config = self._config.model_copy(update={"prefix": n_groups})
        return TextProbe(load_model(shards, config), load_transcoder(self._checkpoint, shards, config), shards)
