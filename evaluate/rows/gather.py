"""Source activations of rows that are named by their place, read chunk after chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import BFloat16, Int
from torch import Tensor

from matryoshka.shards import Split


def gather_source(
    split: Split,
    contexts: Int[Tensor, " rows"],
    positions: Int[Tensor, " rows"],
    d_in: int,
    advanced: Callable[[int], None] | None = None,
) -> BFloat16[Tensor, "rows d_in"]:
    """Row i is the source at (contexts[i], positions[i]) of the split; only the chunks that hold one are read."""
    gathered = torch.empty(len(contexts), d_in, dtype=torch.bfloat16)
    size = split.chunk_positions
    first = 0
    for shard, n_contexts in enumerate(split.shard_contexts):
        in_shard = ((contexts >= first) & (contexts < first + n_contexts)).nonzero().squeeze(1)
        chunks = positions[in_shard] // size
        for chunk in torch.unique(chunks).tolist():
            rows = in_shard[chunks == chunk]
            start = chunk * size
            block = split.activations("source", shard, start, start + size)
            gathered[rows] = block[positions[rows] - start, contexts[rows] - first]
            if advanced is not None:
                advanced(len(rows))
        first += n_contexts
    return gathered
