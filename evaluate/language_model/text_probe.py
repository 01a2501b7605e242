"""Any text through the language model and a transcoder: which latents fire on each of its tokens."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.splice import check_model
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .load import text_of_tokens


class LatentAct(TypedDict):
    """A latent and its activation."""

    latent: int
    act: float


class TokenLatents(TypedDict):
    """A token and its strongest latents, the strongest first."""

    token: str
    latents: list[LatentAct]


class TextProbe:
    """Reads texts as the harvest read its own: no special tokens in them, BOS in front where the shard set has it."""

    def __init__(self, model: LanguageModel, transcoder: Transcoder, shards: ShardSet) -> None:
        """Raises UserError when the three do not belong together."""
        self._norm = check_model(transcoder, model)
        self.model, self.transcoder = model, transcoder.to(model.device)
        self._bos_id, self._special_ids = shards.manifest.bos_id, shards.manifest.special_ids
        self._text_of = text_of_tokens(model)

    def tokens(self, text: str) -> Tensor:
        """[1, n] int64, with BOS where the shard set has it. Raises UserError for a text without tokens or too long."""
        ids = self.model.tokenizer([text], add_special_tokens=False, split_special_tokens=True, verbose=False)
        found: list[int] = ids["input_ids"][0]
        if not found:
            raise UserError("the text has no tokens; give at least one word")
        front = [] if self._bos_id is None else [self._bos_id]
        if len(found) + len(front) > self.model.n_ctx:
            raise UserError(f"the text has {len(found)} tokens, and {self.model.name} takes {self.model.n_ctx}")
        return torch.tensor([front + found])

    def replaced(self, tokens: Tensor) -> Tensor:
        """Where a transcoder is applied: the tokens that are not special, bool like `tokens`."""
        return ~torch.isin(tokens, torch.tensor(self._special_ids, dtype=tokens.dtype))

    def acts(self, tokens: Tensor) -> Tensor:
        """Activations [n, d_sae] of the tokens [1, n], float32; 0 at special ones."""
        config = self.transcoder.config
        raw = self.model.capture(tokens, [config.source_hook])[config.source_hook][0]
        x = apply_convention(raw, config.input, source_site=config.source_site, norm=self._norm)
        return self.transcoder.encode(x) * self.replaced(tokens)[0, :, None].to(x.device)

    @torch.inference_mode()
    def top_latents(self, text: str, n: int = 5) -> list[TokenLatents]:
        """For each token of `text` the `n` latents that fire most on it, or as many as fire; BOS is left out.

        >>> TextProbe(model, transcoder, shards).top_latents("a word", n=1)          # doctest: +SKIP
        [{"token": "a", "latents": [{"latent": 17, "act": 3.2}]}, {"token": " word", "latents": []}]
        """
        tokens = self.tokens(text)
        best = self.acts(tokens).topk(min(n, self.transcoder.config.d_sae), dim=1)
        found: list[TokenLatents] = []
        for token, acts, latents in zip(tokens[0].tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip(latents, acts, strict=True)
            fires: list[LatentAct] = [{"latent": latent, "act": act} for latent, act in pairs if act > 0]
            found.append({"token": self._text_of(token), "latents": fires})
        return found if self._bos_id is None else found[1:]
