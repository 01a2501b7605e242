"""From what a pass has chosen to the rows of samples.parquet: which windows, in which order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.shards import Split

from ...rows.windows import WindowShape, mixed, windows_of
from .sampling import Sampling
from .top_windows import EMPTY, TopWindows

TOP, DECILE, RANDOM = 0, 1, 2
KINDS = ("top", "decile", "random")
N_DECILES = 10
_LATENTS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class SampleRows:
    """One entry a window, ordered by latent, kind, falling decile and rank. All int64 [n] but `value`."""

    latent: Tensor
    kind: Tensor
    """Index into KINDS."""
    decile: Tensor
    """1 to 10 (strongest) of a decile window, else 0."""
    rank: Tensor
    """From 1, within its kind (and decile)."""
    place: Tensor
    """context * ctx_len + position of the token that the window is about."""
    slot: Tensor
    """Slot of the window in its TopWindows; -1 for a random one."""
    value: Tensor
    """float32 activation at the place."""


@dataclass(frozen=True, slots=True)
class WindowTokens:
    """The text of n windows."""

    tokens: Tensor
    """[n, width] int32 token ids; -1 where a window is cut short"""
    doc_ids: Tensor
    """[n] int32"""


def sample_rows(sampling: Sampling, per_decile: int, n_random: int) -> SampleRows:
    """All windows of all latents."""
    parts = []
    for start in range(0, len(sampling.top.score), _LATENTS_AT_ONCE):
        latents = slice(start, start + _LATENTS_AT_ONCE)
        columns = [
            torch.cat(column)
            for column in zip(
                _top(sampling.top, latents),
                _deciles(sampling.sample, sampling.top, latents, per_decile),
                _random(sampling, latents, n_random),
                strict=True,
            )
        ]
        latent, kind, decile, rank = columns[:4]
        order = torch.arange(len(latent))
        for key in (rank, -decile, kind, latent):
            order = order[key[order].sort(stable=True).indices]
        columns = [column[order] for column in columns]
        columns[0] = columns[0] + start
        parts.append(columns)
    return SampleRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def window_tokens(split: Split, shape: WindowShape, place: Tensor, ctx_len: int) -> WindowTokens:
    """The tokens around n places of a split; reads the token ids of each shard once."""
    tokens = torch.full((len(place), shape.width), -1, dtype=torch.int32)
    doc_ids = torch.zeros(len(place), dtype=torch.int32)
    context, position, first_context = place // ctx_len, place % ctx_len, 0
    for shard, n_in_shard in enumerate(split.shard_contexts):
        in_shard = ((context >= first_context) & (context < first_context + n_in_shard)).nonzero().squeeze(1)
        if len(in_shard) > 0:
            docs = split.doc_ids(shard)
            windows = windows_of(split.tokens(shard), docs, shape)
            own, at = context[in_shard] - first_context, position[in_shard]
            doc_ids[in_shard] = docs[own, at].int()
            for part in torch.arange(len(in_shard)).split(65_536):
                tokens[in_shard[part]] = windows.tokens_around(own[part], at[part]).int()
        first_context += n_in_shard
    return WindowTokens(tokens, doc_ids)


def deciles_of(value: Tensor, is_there: Tensor) -> Tensor:
    """Which tenth, 1 to 10, of its own row each value is in by rank; `value`, `is_there` [rows, n] -> int64.

    Equal values are ranked in their order in the row.
    """
    order = torch.where(is_there, value, torch.inf).sort(dim=1, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order).contiguous())
    return rank * N_DECILES // is_there.sum(1, keepdim=True).clamp_min(1) + 1


Columns = tuple[Tensor, ...]


def _top(top: TopWindows, latents: slice) -> Columns:
    score, place, value = top.score[latents].cpu(), top.place[latents].cpu(), top.value[latents].cpu()
    latent, slot = (score != EMPTY).nonzero(as_tuple=True)
    return (
        latent,
        torch.full_like(latent, TOP),
        torch.zeros_like(latent),
        slot + 1,
        place[latent, slot],
        slot,
        value[latent, slot],
    )


def _deciles(sample: TopWindows, top: TopWindows, latents: slice, per_decile: int) -> Columns:
    """Of the uniform sample, `per_decile` of each tenth that are not among the top windows."""
    score, key, value = sample.score[latents].cpu(), sample.key[latents].cpu(), sample.value[latents].cpu()
    is_there = score != EMPTY
    decile = deciles_of(value, is_there)
    top_there, top_key = top.score[latents].cpu() != EMPTY, top.key[latents].cpu()
    for slot in range(top_key.shape[1]):
        is_there &= ~((key == top_key[:, slot, None]) & top_there[:, slot, None])
    # Sampled rows are in the order of their random priority: the first of each tenth are a fair choice.
    taken = torch.zeros_like(is_there)
    for tenth in range(1, N_DECILES + 1):
        members = is_there & (decile == tenth)
        taken |= members & (members.long().cumsum(1) <= per_decile)
    latent, slot = taken.nonzero(as_tuple=True)
    decile, value = decile[latent, slot], value[latent, slot]
    rank = _rank(latent * (N_DECILES + 1) + decile, value)
    place = sample.place[latents].cpu()[latent, slot]
    return latent, torch.full_like(latent, DECILE), decile, rank, place, slot, value


def _random(sampling: Sampling, latents: slice, n_random: int) -> Columns:
    """For each latent its own draw from the windows of the pool in which it does not fire."""
    usable = sampling.pool_place >= 0
    usable &= _first_of_each(sampling.pool_key)
    silent = ~sampling.pool_fires[latents].cpu() & usable
    numbers = torch.arange(silent.shape[0])[:, None] + latents.start
    draw = mixed(numbers * silent.shape[1] + torch.arange(silent.shape[1]))
    draw = torch.where(silent, draw, torch.iinfo(torch.int64).max)
    chosen = draw.argsort(dim=1, stable=True)[:, :n_random]
    latent, rank = silent.gather(1, chosen).nonzero(as_tuple=True)
    place = sampling.pool_place[chosen[latent, rank]]
    zeros = torch.zeros_like(latent)
    return latent, torch.full_like(latent, RANDOM), zeros, rank + 1, place, zeros - 1, zeros.float()


def _first_of_each(key: Tensor) -> Tensor:
    """Whether no earlier entry has an equal key, bool [n]."""
    ordered, order = key.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(is_first).index_copy_(0, order, is_first)


def _rank(part: Tensor, value: Tensor) -> Tensor:
    """From 1, by falling value within each part, int64 [n]."""
    order = value.sort(descending=True, stable=True).indices
    order = order[part[order].sort(stable=True).indices]
    ordered = part[order]
    rank = torch.arange(len(part)) - torch.searchsorted(ordered, ordered) + 1
    return torch.empty_like(rank).index_copy_(0, order, rank)
