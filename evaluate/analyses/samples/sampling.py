"""One pass over a split that chooses what to show of every latent.

    top      the windows around the largest activations, at most one of a context
    sample   the windows around rows drawn uniformly among all on which the latent fires
    random   windows in which it does not fire, out of a pool of at most one a context

The contexts of a block are encoded latent after latent, so that what fires comes ordered by latent and row: peaks,
windows and merges are then gathers and segment operations, never a search and never a loop over latents. Memory is
that of one shard's source, one block and the chosen windows, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet, Split
from matryoshka.transcoder import Transcoder

from ...measures.activations import CPU_TILE_BYTES, TILE_BYTES, true_indices
from ...rows.context_blocks import ContextBlock
from ...rows.windows import WindowShape, mixed
from .histogram import ActivationHistogram
from .top_windows import TopWindows

POOL = 512
_PRIORITY_BITS = (1 << 62) - 1
_PRIORITY_FACTOR = 2862933555777941757
_SEED_FACTOR = 1_000_000_007_000_003


@dataclass(frozen=True, slots=True)
class Choice:
    """How much to choose."""

    n_top: int
    n_sampled: int
    shape: WindowShape
    seed: int


@dataclass(frozen=True, slots=True)
class ActsByLatent:
    """What fires in a block, ordered by latent and then by row; row = context * positions + position."""

    latent: Tensor
    """[n] int64"""
    row: Tensor
    """[n] int64"""
    value: Tensor
    """[n] float32"""


class Sampling:
    """Chooses while blocks go by."""

    SUMS = ("n_rows", "n_contexts", "top", "sample", "histogram", "pool_place", "pool_key", "pool_fires")

    def __init__(self, transcoder: Transcoder, shards: ShardSet, split: Split, choice: Choice) -> None:
        d_sae, device, width = transcoder.config.d_sae, transcoder.device, choice.shape.width
        self._transcoder, self._shards, self._choice = transcoder, shards, choice
        self.ctx_len, self.shape = shards.ctx_len, choice.shape
        self.n_rows = 0
        self.n_contexts = 0
        """Contexts of the split that have been read."""
        self.top = TopWindows(d_sae, choice.n_top, width, device)
        self.sample = TopWindows(d_sae, choice.n_sampled, width, device)
        self.histogram = ActivationHistogram(d_sae, device)
        generator = torch.Generator().manual_seed(choice.seed)
        drawn = torch.randperm(split.n_contexts, generator=generator)[:POOL]
        self._slot = torch.full((split.n_contexts,), -1, dtype=torch.int64)
        self._slot[drawn] = torch.arange(len(drawn))
        self.pool_place = torch.full((len(drawn),), -1, dtype=torch.int64)
        """[pool] int64: place of each window of the pool; -1 where its context was not reached"""
        self.pool_key = torch.zeros(len(drawn), dtype=torch.int64)
        """[pool] int64: equal windows have equal keys"""
        self.pool_fires = torch.zeros(d_sae, len(drawn), dtype=torch.bool, device=device)
        """[d_sae, pool] bool: whether the latent fires in the window"""

    def add(self, block: ContextBlock) -> None:
        """Choose from one block; blocks come in the order of their contexts."""
        device = self._transcoder.device
        keys = block.windows.keys().flatten().to(device)
        windows = block.windows
        first, last = windows.first.flatten().to(device), windows.last.flatten().to(device)
        fires = encode_by_latent(self._transcoder, self._shards, block)
        offset = block.first_context * self.ctx_len
        self.n_rows += int(block.keep.sum())
        self.n_contexts = block.first_context + len(block.keep)
        self.histogram.add(fires.latent, fires.value)
        self._mark_pool(block, fires)

        def push(kept: TopWindows, chosen: Tensor, score: Tensor) -> None:
            latent, row, value = fires.latent[chosen], fires.row[chosen], fires.value[chosen]
            kept.push(
                latent,
                score,
                keys[row],
                row + offset,
                value,
                lambda which: self._acts(fires, chosen[which], first, last),
            )

        # The bits of positive floats are in the order of the floats.
        strength = fires.value.contiguous().view(torch.int32).long()
        hopeful = (strength > self.top.floor()[fires.latent]).nonzero().squeeze(1)
        peaks = hopeful[self._is_peak(fires, hopeful)]
        push(self.top, peaks, strength[peaks])
        positions = torch.arange(offset, offset + block.keep.numel(), device=device)
        of_row = mixed(positions + self._choice.seed * _SEED_FACTOR)
        of_latent = mixed(torch.arange(self._transcoder.config.d_sae, device=device) - _SEED_FACTOR)
        priority = ((of_row[fires.row] ^ of_latent[fires.latent]) * _PRIORITY_FACTOR) & _PRIORITY_BITS
        drawn = (priority > self.sample.floor()[fires.latent]).nonzero().squeeze(1)
        push(self.sample, drawn, priority[drawn])

    def _is_peak(self, fires: ActsByLatent, chosen: Tensor) -> Tensor:
        """Which of the chosen are the first largest of their latent in their context, bool [chosen]."""
        if len(chosen) == 0:
            return chosen.bool()
        value, context = fires.value[chosen], fires.row[chosen] // self.ctx_len
        _, segment = (fires.latent[chosen] * (int(context.max()) + 1) + context).unique_consecutive(return_inverse=True)
        largest = torch.zeros(int(segment[-1]) + 1, device=value.device).scatter_reduce_(0, segment, value, "amax")
        reaches = value == largest[segment]
        before = reaches.long().cumsum(0) - reaches.long()
        starts = torch.searchsorted(segment, torch.arange(len(largest), device=segment.device))
        return reaches & (before == before[starts][segment])

    def _acts(self, fires: ActsByLatent, chosen: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Activations [chosen, width] of the latent of each chosen entry in the window around its row."""
        shape = self.shape
        around = (chosen[:, None] + shape.offsets(chosen.device)).clamp(0, len(fires.row) - 1)
        row = fires.row[chosen][:, None]
        start = row - row % self.ctx_len
        row_around = fires.row[around]
        inside = (
            (fires.latent[around] == fires.latent[chosen][:, None])
            & (row_around >= start + first[row])
            & (row_around <= start + last[row])
        )
        # Activations outside the window go into an extra column, which is cut off.
        column = torch.where(inside, row_around - row + shape.before, shape.width)
        acts = torch.zeros(len(chosen), shape.width + 1, device=chosen.device)
        return acts.scatter_(1, column, fires.value[around])[:, :-1]

    def _mark_pool(self, block: ContextBlock, fires: ActsByLatent) -> None:
        slots = self._slot[block.first_context : block.first_context + len(block.keep)]
        slots = torch.where(block.keep.any(1), slots, -1)
        context = (slots >= 0).nonzero().squeeze(1)
        if len(context) == 0:
            return
        slot, keep = slots[context], block.keep[context]
        # The n-th kept position of each context, n from its number and the seed.
        n = (mixed(context + block.first_context + self._choice.seed) & _PRIORITY_BITS) % keep.sum(1)
        position = ((keep.long().cumsum(1) == n[:, None] + 1) & keep).long().argmax(1)
        self.pool_place[slot] = (block.first_context + context) * self.ctx_len + position
        self.pool_key[slot] = block.windows.keys()[context, position]
        positions = torch.arange(self.ctx_len)
        first, last = block.windows.first[context, position], block.windows.last[context, position]
        member = torch.full(block.keep.shape, -1, dtype=torch.int64)
        inside = (positions >= first[:, None]) & (positions <= last[:, None])
        member[context] = torch.where(inside, slot[:, None], -1)
        pooled = member.flatten().to(fires.row.device)[fires.row]
        hits = (pooled >= 0).nonzero().squeeze(1)
        self.pool_fires[fires.latent[hits], pooled[hits]] = True


def encode_by_latent(transcoder: Transcoder, shards: ShardSet, block: ContextBlock) -> ActsByLatent:
    """The non-zero entries of `Transcoder.encode` over the kept rows of a block."""
    device = transcoder.device
    x = apply_convention(
        block.source.flatten(0, 1).to(device),
        transcoder.config.input,
        source_site=shards.manifest.source.site,
        norm=shards.norm,
    )
    kept = block.keep.flatten().to(device)
    rows = kept.nonzero().squeeze(1)
    columns = x.index_select(0, rows).T
    floor = transcoder.threshold.clamp_min(0)
    n_bytes = min(TILE_BYTES, 2 * CPU_TILE_BYTES) if device.type == "cpu" else TILE_BYTES
    tile = max(1, n_bytes // (4 * max(len(rows), 1)))
    # One piece of memory for all tiles: new memory for each would cost as much as a tenth of the product.
    buffer = columns.new_empty(min(tile, transcoder.config.d_sae), len(rows))
    parts = []
    for start in range(0, transcoder.config.d_sae, tile):
        end = min(start + tile, transcoder.config.d_sae)
        bias, weights = transcoder.b_enc[start:end, None], transcoder.W_enc[:, start:end].T
        pre_acts = torch.addmm(bias, weights, columns, out=buffer[: end - start])
        found = true_indices((pre_acts > floor[start:end, None]).flatten())
        latent = found // len(rows)
        parts.append((latent + start, rows[found - latent * len(rows)], pre_acts.flatten()[found]))
    latent, row, value = (torch.cat(part) for part in zip(*parts, strict=True))
    return ActsByLatent(latent, row, value)
