"""What can be named in a comparison: our runs, one of their prefixes, and transcoders of other projects."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .checkpoint import find_checkpoint
from .fits import check_fits
from .foreign import (
    GEMMA_SCOPE,
    is_circuit_tracer,
    is_gemma_scope_2,
    is_saelens,
    load_circuit_tracer,
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
    """Read RUN, RUN@PREFIX (the first PREFIX latents alone), gemma-scope:PATH, or a folder of Gemma Scope 2, SAELens
    or circuit-tracer.

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
    elif is_circuit_tracer(Path(place)):
        name, transcoder = Path(place).resolve().name, load_circuit_tracer(Path(place), shards)
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
    shorter = transcoder.prefix(config.prefix_ends.index(end) + 1)
    # What is compared is the whole of it, not its own prefixes.
    shorter.config = shorter.config.model_copy(update={"group_sizes": (end,)})
    return shorter
