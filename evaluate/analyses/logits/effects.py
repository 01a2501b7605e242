"""Which tokens each latent promotes: its decoder row through the final norm and the unembedding, no text needed.

    effect[i, t] = ((W_dec[i] [- mean(W_dec[i])]) * gain) @ W_U[t]   - its mean over all tokens t

What is added to the residual stream at the target site reaches the logits directly (past every later layer) as
a * effect * scale for an activation a, where scale = factor / sqrt(mean((r [- mean(r)])^2) + eps) is that of the final
norm at the position, held fixed, and factor is 1 for nearly all models. The mean of the row is taken off for a
LayerNorm alone; a common shift of all logits changes no probability, so it is taken off too; a soft cap on the logits
is monotone. So the scale, the shift and the cap do not change which tokens come first. The effect in logits, before a
cap, is that at the median scale of some held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka.lm.unembedding import Unembedding

_TILE_BYTES = 256 * 2**20
_TOKENS_AT_ONCE = 32_768


@dataclass
class TokenEffects:
    """The tokens of the largest and of the smallest effect of each latent, the strongest first.

    It grows, a tile of latents at a time.
    """

    raised: Int[Tensor, "latents top"]
    raised_by: Float[Tensor, "latents top"]
    lowered: Int[Tensor, "latents top"]
    lowered_by: Float[Tensor, "latents top"]
    """Not positive, unless a latent raises every token above its mean."""

    @classmethod
    def empty(cls, top: int) -> TokenEffects:
        """Of no latent."""
        tokens, values = torch.zeros(0, top, dtype=torch.int64), torch.zeros(0, top)
        return cls(tokens, values, tokens, values)

    def __len__(self) -> int:
        return len(self.raised)

    def extend(self, more: TokenEffects) -> None:
        """Add the next latents."""
        for name in ("raised", "raised_by", "lowered", "lowered_by"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(more, name)]))


@torch.inference_mode()
def effect_tiles(
    W_dec: Float[Tensor, "latents d_model"], unembedding: Unembedding, n_tokens: int, top: int, start: int = 0
) -> Iterator[TokenEffects]:
    """The `top` strongest effects on either side, among the first `n_tokens` tokens (those behind them are padding),
    of the latents from `start` on, which is a multiple of the latents in a tile.

    Float32, a tile of tokens and latents at a time; only the running best are kept.
    """
    W_U = unembedding.W_U[:n_tokens]
    # Added up on the CPU: MPS has no float64.
    sums = [part.float().sum(0).cpu().double() for part in W_U.split(_TOKENS_AT_ONCE)]
    mean = (torch.stack(sums).sum(0) / n_tokens).float().to(W_U.device)
    directions = unembedding.effect_directions(W_dec[start:].to(W_U.device))
    for rows in directions.split(max(1, _TILE_BYTES // (4 * _TOKENS_AT_ONCE))):
        none = rows.new_zeros(len(rows), 0)
        best = {sign: (none, none.long()) for sign in (1.0, -1.0)}
        for first in range(0, n_tokens, _TOKENS_AT_ONCE):
            effects = rows @ (W_U[first : first + _TOKENS_AT_ONCE].float() - mean).T
            for sign, (values, tokens) in best.items():
                found = (sign * effects).topk(min(top, effects.shape[1]), dim=1)
                values = torch.cat([values, found.values], 1)
                tokens = torch.cat([tokens, found.indices + first], 1)
                values, order = values.topk(min(top, values.shape[1]), dim=1)
                best[sign] = (values, tokens.gather(1, order))
        (up, raised), (down, lowered) = best.values()
        yield TokenEffects(raised.cpu(), up.cpu(), lowered.cpu(), -down.cpu())
