"""In which contexts some latents fire, and how strongly, from the stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet, Split
from matryoshka.transcoder import Transcoder

from ..analysis import Progress, Silent


@dataclass(frozen=True, slots=True)
class Firing:
    """Of a few latents, over the first contexts of a split."""

    counts: Int[Tensor, "latents contexts"]
    """Rows on which each one fires, int64."""
    largest: Float[Tensor, " latents"]
    """Largest activation; 0 where it never fires."""


def check_latents(transcoder: Transcoder, latents: Sequence[int]) -> None:
    """Raise UserError unless there is one and the transcoder has them all."""
    d_sae = transcoder.config.d_sae
    if not latents:
        raise UserError("no latent was named; give one or more numbers, for example 17")
    if wrong := [latent for latent in latents if not 0 <= latent < d_sae]:
        raise UserError(f"the transcoder has the latents 0 to {d_sae - 1}, and no latent {wrong[0]}")


@torch.inference_mode()
def find_firing(
    transcoder: Transcoder,
    shards: ShardSet,
    split: Split,
    latents: list[int],
    n_contexts: int,
    progress: Progress | None = None,
) -> Firing:
    """Encode the first `n_contexts` contexts with the columns of `latents` alone; special positions never fire."""
    chosen = torch.tensor(latents, device=transcoder.device)
    W_enc, b_enc = transcoder.W_enc[:, chosen], transcoder.b_enc[chosen]
    floor = transcoder.threshold[chosen].clamp_min(0)
    counts = torch.zeros(len(latents), n_contexts, dtype=torch.int64)
    largest = torch.zeros(len(latents))
    progress = progress or Silent()
    first = 0
    for shard, n_here in enumerate(split.shard_contexts):
        n_wanted = min(n_here, n_contexts - first)
        if n_wanted <= 0:
            break
        keep = split.keep(shard)[:, :n_wanted]
        for start in range(0, shards.ctx_len, split.chunk_positions):
            here = keep[start : start + split.chunk_positions]
            source = split.activations("source", shard, start, start + len(here))[:, :n_wanted]
            x = apply_convention(
                source.to(transcoder.device),
                transcoder.config.input,
                source_site=shards.manifest.source.site,
                norm=shards.norm,
            )
            pre_acts = x @ W_enc + b_enc
            acts = torch.where((pre_acts > floor) & here.to(x.device)[..., None], pre_acts, 0.0)
            counts[:, first : first + n_wanted] += (acts > 0).sum(0).T.cpu()
            largest = torch.maximum(largest, acts.amax((0, 1)).cpu())
            progress.advanced(int(here.sum()))
        first += n_wanted
    return Firing(counts, largest)
