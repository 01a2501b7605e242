"""Which tokens each latent speaks for: its decoder row through the final norm and the unembedding, no text needed.

    effect[i, t] = ((W_dec[i] [- mean(W_dec[i])]) * gain) @ W_U[t]   - its mean over all tokens t

What is added to the residual stream at the target site reaches the logits directly (past every later layer) as
a * effect / s for an activation a, where s > 0 is the scale of the final norm at the position, held fixed. The mean of
the row is taken off for a LayerNorm alone; a common shift of all logits changes no probability, so it is taken off too;
a soft cap on the logits is monotone. So s, the shift and the cap do not change which tokens come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka.lm.unembedding import Unembedding

_TILE_BYTES = 256 * 2**20
_TOKENS_AT_ONCE = 32_768


@dataclass(frozen=True, slots=True)
class TokenEffects:
    """The tokens of the largest and of the smallest effect of each latent, the strongest first."""

    raised: Int[Tensor, "latents top"]
    raised_by: Float[Tensor, "latents top"]
    lowered: Int[Tensor, "latents top"]
    lowered_by: Float[Tensor, "latents top"]
    """Not positive, unless a latent raises every token above its mean."""


@torch.inference_mode()
def token_effects(
    W_dec: Float[Tensor, "latents d_model"], unembedding: Unembedding, n_tokens: int, top: int
) -> TokenEffects:
    """The `top` strongest effects on either side, among the first `n_tokens` tokens (those behind them are padding).

    Float32, a tile of tokens and latents at a time; only the running best are kept.
    """
    W_U = unembedding.W_U[:n_tokens]
    # Added up on the CPU: MPS has no float64.
    sums = [part.float().sum(0).cpu().double() for part in W_U.split(_TOKENS_AT_ONCE)]
    mean = (torch.stack(sums).sum(0) / n_tokens).float().to(W_U.device)
    directions = unembedding.effect_directions(W_dec.to(W_U.device))
    top = min(top, n_tokens)
    latents_at_once = max(1, _TILE_BYTES // (4 * _TOKENS_AT_ONCE))
    sides: list[tuple[Tensor, Tensor]] = []
    for sign in (1.0, -1.0):
        best: list[tuple[Tensor, Tensor]] = []
        for rows in directions.split(latents_at_once):
            values, tokens = (
                rows.new_empty(len(rows), 0),
                torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device),
            )
            for start in range(0, n_tokens, _TOKENS_AT_ONCE):
                centred = W_U[start : start + _TOKENS_AT_ONCE].float() - mean
                found = (sign * rows @ centred.T).topk(min(top, len(centred)), dim=1)
                values = torch.cat([values, found.values], 1)
                tokens = torch.cat([tokens, found.indices + start], 1)
                values, order = values.topk(min(top, values.shape[1]), dim=1)
                tokens = tokens.gather(1, order)
            best.append((tokens.cpu(), sign * values.cpu()))
        tokens, values = (torch.cat(parts) for parts in zip(*best, strict=True))
        sides.append((tokens, values))
    return TokenEffects(*sides[0], *sides[1])
