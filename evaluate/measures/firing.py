"""In which contexts some latents fire, and how strongly, from the stored rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet, Split
from matryoshka.transcoder import Transcoder


@dataclass
class Firing:
    """Of a few latents, over the first contexts of a split; it grows, some positions of a shard at a time."""

    counts: Int[Tensor, "latents contexts"]
    """Rows on which each one fires, int64."""
    largest: Float[Tensor, " latents"]
    """Largest activation; 0 where it never fires."""
    n_chunks: int = 0
    """Chunks of positions that are in it."""
    n_rows: int = 0
    """Rows in them."""

    @classmethod
    def empty(cls, n_latents: int, n_contexts: int) -> Firing:
        """Of no row yet."""
        return cls(torch.zeros(n_latents, n_contexts, dtype=torch.int64), torch.zeros(n_latents))


def find_firing(
    transcoder: Transcoder, shards: ShardSet, split: Split, latents: Sequence[int], n_contexts: int
) -> Firing:
    """Of `latents` in the first `n_contexts` contexts."""
    found = Firing.empty(len(latents), n_contexts)
    for _ in add_firing(found, transcoder, shards, split, latents):
        pass
    return found


@torch.inference_mode()
def add_firing(
    found: Firing, transcoder: Transcoder, shards: ShardSet, split: Split, latents: Sequence[int]
) -> Iterator[int]:
    """Add to `found` what it lacks, and give the number of rows of each chunk when they are in it.

    Only the columns of `latents` are encoded; special positions never fire.
    """
    chosen = torch.tensor(latents, device=transcoder.device)
    W_enc, b_enc = transcoder.W_enc[:, chosen], transcoder.b_enc[chosen]
    floor = transcoder.threshold[chosen].clamp_min(0)
    first = chunk = 0
    for shard, n_here in enumerate(split.shard_contexts):
        n_wanted = min(n_here, found.counts.shape[1] - first)
        if n_wanted <= 0:
            break
        keep = split.keep(shard)[:, :n_wanted]
        for start in range(0, shards.ctx_len, split.chunk_positions):
            chunk += 1
            if chunk <= found.n_chunks:
                continue
            keep_chunk = keep[start : start + split.chunk_positions]
            source = split.activations("source", shard, start, start + len(keep_chunk))[:, :n_wanted]
            x = apply_convention(
                source.to(transcoder.device),
                transcoder.config.input,
                source_site=shards.manifest.source.site,
                norm=shards.norm,
            )
            pre_acts = x @ W_enc + b_enc
            acts = torch.where((pre_acts > floor) & keep_chunk.to(x.device)[..., None], pre_acts, 0.0)
            found.counts[:, first : first + n_wanted] += (acts > 0).sum(0).T.cpu()
            found.largest = torch.maximum(found.largest, acts.amax((0, 1)).cpu())
            found.n_chunks, found.n_rows = chunk, found.n_rows + int(keep_chunk.sum())
            yield int(keep_chunk.sum())
        first += n_wanted


def latent_acts(transcoder: Transcoder, latent: int, x: Tensor) -> Tensor:
    """Activations [...] of one latent for inputs x [..., d_in] in the transcoder's convention; float32."""
    pre_acts = x @ transcoder.W_enc[:, latent] + transcoder.b_enc[latent]
    return torch.where(pre_acts > transcoder.threshold[latent].clamp_min(0), pre_acts, 0.0)
