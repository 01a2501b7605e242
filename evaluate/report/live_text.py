"""Your own text through the language model and the transcoder, for the pages of `evaluate serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matryoshka.errors import UserError

from ..analysis import load_transcoder
from ..checkpoint import Checkpoint
from ..config import EvaluateConfig
from ..result import TranscoderFacts
from ..shard_set import open_shards
from ..show import visible

if TYPE_CHECKING:
    from ..intervention.live import TextProbe

MAX_TOKENS = 1024
"""Longer texts would make a page of their own, and with many latents a tensor of gigabytes."""
N_LATENTS = 48
"""Strongest latents that are listed of each token."""


class LiveText:
    """Loads the language model when the first text comes, which takes seconds, and keeps it."""

    def __init__(self, checkpoint: Checkpoint, facts: TranscoderFacts, config: EvaluateConfig) -> None:
        """`facts`: the weights that the pages are about, which `checkpoint` must still be."""
        self._checkpoint, self._facts, self._config = checkpoint, facts, config
        self._probe: TextProbe | None = None

    def tokens(self, text: str) -> dict[str, Any]:
        """{"tokens": [{"text": ..., "latents": [[latent, activation], ...]}, ...]}, the strongest latents first.

        Raises UserError when the text or the model cannot be had.
        """
        if not text.strip():
            raise UserError("there is no text to try; type a few words")
        if self._probe is None:
            self._probe = self._load()
        n_tokens = self._probe.tokens(text).shape[1]
        if n_tokens > MAX_TOKENS:
            raise UserError(f"the text has {n_tokens:,} tokens, and {MAX_TOKENS:,} can be shown; shorten it")
        found = self._probe.top_latents(text, N_LATENTS)
        return {
            "tokens": [
                {
                    "text": visible(token["token"]),
                    "latents": [[fires["latent"], float(f"{fires['act']:.5g}")] for fires in token["latents"]],
                }
                for token in found
            ]
        }

    def _load(self) -> TextProbe:
        from ..intervention.live import TextProbe
        from ..intervention.model import load_model

        shards = open_shards(self._checkpoint, self._config.shards, lambda _: None)
        if self._checkpoint.sha256 != self._facts.sha256:
            raise UserError("the run was trained on since these pages were made; make them again")
        n_groups = len(self._facts.config["group_sizes"])
        config = self._config.model_copy(update={"prefix": n_groups})
        return TextProbe(load_model(shards, config), load_transcoder(self._checkpoint, shards, config), shards)
