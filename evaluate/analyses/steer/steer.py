"""`evaluate steer`: continue a text with the model, as it is and with one latent's direction added throughout.

The pages of `evaluate serve` do the same, and scale the latent where it fires (0 takes it out).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from matryoshka.checkpoints import Checkpoint, find_checkpoint
from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.splice import edited
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from ...analysis import Progress, Silent, load_transcoder
from ...config import EvaluateConfig
from ...language_model.load import load_model
from ...language_model.text_probe import TextProbe
from ...measures.firing import find_firing, latent_acts
from ...rows.context_blocks import count_contexts
from ...subject.latents import check_latents
from ...subject.shard_set import open_shards


@dataclass(frozen=True, slots=True)
class Steered:
    """What the model writes."""

    prompt: str
    plain: str
    """The continuation without, and with the latent."""
    steered: str
    latent: int
    scale: float
    max_act: float
    """Largest activation of the latent on the rows that were looked at; what is added is scale * max_act * W_dec."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How a continuation is drawn."""

    n_tokens: int = 40
    temperature: float = 0.0
    """0 takes the most likely token; else each is drawn from softmax(logits / temperature)."""
    seed: int = 0


def steer(
    run: Path,
    latent: int,
    text: str,
    config: EvaluateConfig,
    progress: Progress | None = None,
    *,
    scale: float = 1.0,
    writing: Writing | None = None,
) -> Steered:
    """Continue `text` twice; nothing is written to the disk. Raises UserError for invalid input."""
    writing = writing or Writing()
    if writing.temperature < 0 or writing.n_tokens < 1:
        raise UserError(
            f"a temperature of {writing.temperature} and {writing.n_tokens} tokens make no text; give a temperature "
            "from 0 on and at least one token"
        )
    progress, checkpoint = progress or Silent(), find_checkpoint(run)
    shards = open_shards(checkpoint, config.shards, progress.noted)
    config = config.model_copy(update={"prefix": None})
    transcoder = load_transcoder(checkpoint, shards, config)
    check_latents(transcoder.config.d_sae, [latent])
    max_act = largest_activation(checkpoint, transcoder, shards, config, latent)
    model = load_model(shards, config)
    probe = TextProbe(model, transcoder, shards)
    tokens = probe.tokens(text)
    plain = continuation(model, tokens, writing)
    steered = continuation(model, tokens, writing, adding(scale * max_act * transcoder.W_dec[latent], probe))
    return Steered(text, plain, steered, latent, scale, max_act)


During = Callable[[Tensor], AbstractContextManager[None]]
"""What a forward of these tokens runs in."""


def adding(addition: Tensor, probe: TextProbe) -> During:
    """Forwards in which `addition` [d_out] is added to the target at every position but special ones (BOS)."""
    addition = addition.to(probe.model.device)

    def during(tokens: Tensor) -> AbstractContextManager[None]:
        where = probe.replaced(tokens)[..., None].to(addition.device)
        return edited(probe.transcoder, probe.model, lambda _x, target: target + where * addition)

    return during


def scaling(latent: int, factor: float, probe: TextProbe) -> During:
    """Forwards in which the activation of `latent` is multiplied with `factor` wherever it fires; the error term
    stays, as in `evaluate ablate`."""
    transcoder = probe.transcoder

    def during(tokens: Tensor) -> AbstractContextManager[None]:
        where = probe.replaced(tokens).to(transcoder.device)

        def scaled(x: Tensor, target: Tensor) -> Tensor:
            act = latent_acts(transcoder, latent, x.to(transcoder.device)) * where
            return target + (factor - 1) * act[..., None] * transcoder.W_dec[latent]

        return edited(transcoder, probe.model, scaled)

    return during


def continuation(
    model: LanguageModel, tokens: Tensor, writing: Writing, during: During = lambda _tokens: nullcontext()
) -> str:
    """What the model writes after `tokens` [1, n], up to a special token; the whole text goes through it each time."""
    generator = torch.Generator().manual_seed(writing.seed)
    n_prompt, n_known = tokens.shape[1], len(model.tokenizer)
    while tokens.shape[1] < min(n_prompt + writing.n_tokens, model.n_ctx):
        with during(tokens):
            logits = model.logits(tokens)[0, -1, :n_known].float().cpu()
        if writing.temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            token = torch.multinomial((logits / writing.temperature).softmax(-1), 1, generator=generator)
        if int(token) in model.special_ids:
            break
        tokens = torch.cat([tokens, token[None]], 1)
    # Decoded with the prompt: alone, some tokenizers lose the first space.
    prompt = model.tokenizer.decode(tokens[0, :n_prompt])
    return model.tokenizer.decode(tokens[0]).removeprefix(prompt)


def largest_activation(
    checkpoint: Checkpoint, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig, latent: int
) -> float:
    """Of `latent` on the first `config.tokens` rows. Raises UserError when it never fires there."""
    split = shards.split(config.split)
    n_contexts, n_rows = count_contexts(split, config.tokens)
    found = float(find_firing(transcoder, shards, split, [latent], n_contexts).largest[0])
    if found == 0:
        raise UserError(
            f"latent {latent} of {checkpoint.name} fires on none of {n_rows} {config.split} rows, so that there is no "
            "scale for it; choose another latent, or more rows with --tokens"
        )
    return found
