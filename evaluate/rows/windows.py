"""The window of tokens around a position: within one context and one document, some tokens back and some ahead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FACTOR = 6364136223846793005
_MIX = (-4658895280553007687, -7723592293110705685)
_SHIFT_MASKS = ((30, (1 << 34) - 1), (27, (1 << 37) - 1), (31, (1 << 33) - 1))


@dataclass(frozen=True, slots=True)
class WindowShape:
    """How far a window reaches."""

    before: int
    after: int

    @property
    def width(self) -> int:
        """Tokens in a window that nothing cuts short."""
        return self.before + 1 + self.after

    def offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """[width] int64: places of the window relative to its own position."""
        return torch.arange(-self.before, self.after + 1, device=device)


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows around every position of some contexts."""

    shape: WindowShape
    tokens: Tensor
    """[contexts, positions] int64"""
    first: Tensor
    """[contexts, positions] int64: first position of each window"""
    last: Tensor
    """[contexts, positions] int64: last position of each window, inclusive"""

    def tokens_around(self, context: Tensor, position: Tensor) -> Tensor:
        """[n, width] int64 token ids of the windows around n positions; -1 where the window is cut short."""
        around = position[:, None] + self.shape.offsets(position.device)
        inside = (around >= self.first[context, position][:, None]) & (around <= self.last[context, position][:, None])
        found = self.tokens[context[:, None], around.clamp(0, self.tokens.shape[1] - 1)]
        return torch.where(inside, found, -1)

    def keys(self) -> Tensor:
        """[contexts, positions] int64: equal windows (same tokens, same place of the position in them) have equal keys.

        A 64-bit hash: among 10^9 windows the chance that any two others share one is about 3%.
        """
        n_contexts, n_positions = self.tokens.shape
        key = torch.zeros_like(self.tokens)
        positions = torch.arange(n_positions, device=self.tokens.device)
        for offset in self.shape.offsets().tolist():
            there = (positions + offset).clamp(0, n_positions - 1)
            inside = (positions + offset >= self.first) & (positions + offset <= self.last)
            key = key * _FACTOR + torch.where(inside, self.tokens[:, there] + 2, 1)
        assert key.shape == (n_contexts, n_positions)
        return mixed(key)


def windows_of(tokens: Tensor, doc_ids: Tensor, shape: WindowShape) -> Windows:
    """Windows of contexts [contexts, positions]; a window ends where the document does."""
    n_positions = tokens.shape[1]
    positions = torch.arange(n_positions, device=tokens.device).expand(tokens.shape)
    changes = doc_ids[:, 1:] != doc_ids[:, :-1]
    edge = torch.ones_like(changes[:, :1])
    starts = torch.cat([edge, changes], 1)
    ends = torch.cat([changes, edge], 1)
    doc_first = torch.where(starts, positions, 0).cummax(1).values
    doc_last = n_positions - 1 - torch.where(ends, n_positions - 1 - positions, 0).flip(1).cummax(1).values.flip(1)
    return Windows(
        shape=shape,
        tokens=tokens.long(),
        first=torch.maximum(positions - shape.before, doc_first),
        last=torch.minimum(positions + shape.after, doc_last),
    )


def mixed(x: Tensor) -> Tensor:
    """Spread int64 numbers over all their bits, one to one (the finaliser of SplitMix64; Steele et al. 2014)."""
    (shift_1, mask_1), (shift_2, mask_2), (shift_3, mask_3) = _SHIFT_MASKS
    # Int64 shifts keep the sign, so the bits that come in from the left are masked off.
    x = (x ^ ((x >> shift_1) & mask_1)) * _MIX[0]
    x = (x ^ ((x >> shift_2) & mask_2)) * _MIX[1]
    return x ^ ((x >> shift_3) & mask_3)
