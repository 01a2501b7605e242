"""The int8 codec: activations as q * channel * scale, a factor for each channel and one for each token.

    channel_j = rms of channel j over the ordinary rows of the shard
    scale_t   = max_j |x_tj / channel_j| / 127
    q_tj      = round(x_tj / (channel_j * scale_t))

Ordinary rows are the non-special ones under 10 times the median norm. A few channels of a residual stream are hundreds
of times larger than the rest, and in attention sinks thousands of times: without the channel factor they would take
all of a row's 8 bits, and with one that follows the sinks those channels would have none left elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.shards.manifest import CodecError
from matryoshka.shards.row_sums import row_blocks

SINK_NORM = 10.0
"""A row is an attention sink when its norm is above this multiple of the median."""
_LEVELS = 127


@dataclass(frozen=True, slots=True)
class Scaled:
    """One side of a shard in int8."""

    q: Tensor
    """[ctx_len, n_contexts, width] int8"""
    channel: Tensor
    """[width] float32"""
    scale: Tensor
    """[ctx_len, n_contexts] float32"""

    def values(self) -> Tensor:
        """What a reader gets: bfloat16 [ctx_len, n_contexts, width]."""
        return unscale(self.q, self.channel, self.scale)


def unscale(q: Tensor, channel: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 values of q [..., width] int8, channel [width] and scale [...] float32; rounded once."""
    values = torch.empty(q.shape, dtype=torch.bfloat16)
    rows, scales = values.view(-1, len(channel)), scale.reshape(-1, 1)
    for here, whole in row_blocks(q):
        rows[here] = whole.mul_(channel).mul_(scales[here])
    return values


def to_scaled(values: Tensor, keep: Tensor) -> tuple[Scaled, CodecError]:
    """Code `values` [ctx_len, n_contexts, width] bfloat16; `keep` [ctx_len, n_contexts] says which are not special.

    Block by block, since a float32 copy of a shard would take twice its memory.
    """
    ordinary = _ordinary(values, keep).reshape(-1)
    channel = _channel_rms(values, ordinary)
    q = torch.empty(len(ordinary), len(channel), dtype=torch.int8)
    scale = torch.empty(len(ordinary), dtype=torch.float32)
    error_sq, total_sq = 0.0, 0.0
    for here, rows in row_blocks(values):
        relative = rows / channel
        largest = relative.abs().amax(dim=1)
        scale[here] = torch.where(largest > 0, largest / _LEVELS, 1.0)
        q[here] = relative.div_(scale[here, None]).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
        decoded = unscale(q[here], channel, scale[here]).float()
        kept = ordinary[here]
        error_sq += float((rows - decoded)[kept].double().square_().sum())
        total_sq += float(rows[kept].double().square_().sum())
    coded = Scaled(q=q.view(values.shape), channel=channel, scale=scale.view(values.shape[:-1]))
    return coded, CodecError(error_sq=error_sq, total_sq=total_sq)


def _ordinary(values: Tensor, keep: Tensor) -> Tensor:
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for _, rows in row_blocks(values)]).view(keep.shape)
    if not bool(keep.any()):
        return torch.ones_like(keep)
    return keep & (norms <= SINK_NORM * norms[keep].median())


def _channel_rms(values: Tensor, ordinary: Tensor) -> Tensor:
    total = torch.zeros(values.shape[-1], dtype=torch.float64)
    for here, rows in row_blocks(values):
        total += rows[ordinary[here]].double().square_().sum(0)
    rms = (total / ordinary.sum()).sqrt().float()
    return torch.where(rms > 0, rms, 1.0)
