"""What can be named in a comparison: our runs, one of their prefixes, and transcoders of other projects."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .checkpoint import find_checkpoint
from .fits import check_fits
from .foreign import (
    GEMMA_SCOPE,
    is_gemma_scope_2,
    is_saelens,
    load_gemma_scope,
    load_gemma_scope_2,
    load_saelens,
)

_PREFIX = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True, slots=True)
class Contender:
    """A transcoder in a comparison."""

    name: str
    transcoder: Transcoder

    def digest(self) -> str:
        """sha256 of the weights as they are compared."""
        hasher = hashlib.sha256()
        for key, weight in sorted(self.transcoder.named_parameters()):
            hasher.update(f"{key}{tuple(weight.shape)}".encode())
            hasher.update(weight.detach().cpu().numpy().tobytes())
        return hasher.hexdigest()


def load_contender(text: str, shards: ShardSet) -> Contender:
    """Read RUN, RUN@PREFIX (the first PREFIX latents alone), gemma-scope:PATH, or a Gemma Scope 2 or SAELens folder.

    Raises UserError when nothing of the kind is there or it does not fit the shard set.
    """
    match = _PREFIX.fullmatch(text)
    place, end = (match[1], int(match[2])) if match is not None else (text, None)
    if place.startswith(GEMMA_SCOPE):
        path = Path(place.removeprefix(GEMMA_SCOPE))
        name, transcoder = place, load_gemma_scope(path, shards)
    elif is_gemma_scope_2(Path(place)):
        name, transcoder = Path(place).resolve().name, load_gemma_scope_2(Path(place), shards)
    elif is_saelens(Path(place)):
        name, transcoder = Path(place).resolve().name, load_saelens(Path(place), shards)
    else:
        checkpoint = find_checkpoint(Path(place))
        name, transcoder = checkpoint.name, Transcoder.load(checkpoint.folder)
    if name.startswith(GEMMA_SCOPE):
        parts = Path(place.removeprefix(GEMMA_SCOPE)).resolve().parts
        name = GEMMA_SCOPE + "/".join(part for part in parts[-4:] if re.match(r"layer_|width_|average_l0_", part))
    check_fits(transcoder, shards, text)
    if end is not None:
        name, transcoder = f"{name}@{end}", cut_prefix(transcoder, end, text)
    return Contender(name, transcoder)


def cut_prefix(transcoder: Transcoder, end: int, name: str) -> Transcoder:
    """The first `end` latents as a transcoder of one group; `end` must be the end of a nested group."""
    config = transcoder.config
    if end not in config.prefix_ends:
        raise UserError(f"{name}: {end} is not the end of a nested group; they are {config.prefix_ends}")
    weights = dict(transcoder.named_parameters())
    cut = {
        "W_enc": weights["W_enc"][:, :end],
        "b_enc": weights["b_enc"][:end],
        "W_dec": weights["W_dec"][:end],
        "threshold": weights["threshold"][:end],
    }
    shorter = Transcoder(config.model_copy(update={"group_sizes": (end,), "k": min(config.k, end)}))
    shorter.set_weights({**{key: torch.as_tensor(weight) for key, weight in weights.items()}, **cut})
    return shorter
