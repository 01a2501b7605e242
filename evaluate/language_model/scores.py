"""How far the predictions of a changed model are from those of the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matryoshka.errors import UserError

_CHUNK_BYTES = 128 * 2**20
"""Float32 log-probabilities held at once, of each of the two models."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each scored position, float64 [positions] on the CPU, in nats."""

    ce_clean: Tensor
    """-log p(next token)"""
    ce: Tensor
    """-log q(next token)"""
    kl: Tensor
    """KL(p || q) = sum_v p_v (log p_v - log q_v)"""
    same_top: Tensor
    """1 where p and q have the same most likely token, else 0"""
    log_ratio: Tensor | None
    """float64 [n_tokens]: log q - log p, summed over the positions"""


def score(
    clean: Float[Tensor, "contexts ctx_len n_tokens"],
    changed: Float[Tensor, "contexts ctx_len n_tokens"],
    where: Tensor,
    next_tokens: Int[Tensor, " positions"],
    *,
    ratios: bool = False,
) -> Scores:
    """Compare the predictions p (clean) and q (changed) at the positions where `where` [contexts, ctx_len] is true.

    Raises UserError when logits are not finite.
    """
    positions = where.to(clean.device).nonzero()
    wanted = next_tokens.to(clean.device)
    rows = max(1, _CHUNK_BYTES // (4 * clean.shape[-1]))
    parts: list[Tensor] = []
    log_ratio = torch.zeros(clean.shape[-1], dtype=torch.float64) if ratios else None
    for start in range(0, len(positions), rows):
        context, position = positions[start : start + rows].T
        log_p = clean[context, position].float().log_softmax(-1)
        log_q = changed[context, position].float().log_softmax(-1)
        next_here = wanted[start : start + rows, None]
        # A token that the model never gives (its logit is -inf) adds nothing.
        ratio = torch.where(log_p.isfinite(), log_q - log_p, 0.0)
        kl = -(log_p.exp() * ratio).sum(-1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        ce_clean, ce = (-log.gather(1, next_here).squeeze(1) for log in (log_p, log_q))
        parts.append(torch.stack([ce_clean, ce, kl, same]).cpu())
        if log_ratio is not None:
            log_ratio += ratio.sum(0).cpu()
    numbers = torch.cat(parts, 1).double() if parts else torch.zeros(4, 0, dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise UserError(
            f"the language model gave logits that are not finite in {str(clean.dtype).removeprefix('torch.')}. "
            + (
                "float16 overflows in some models: load it with --set evaluate.lm.dtype=bfloat16 or float32"
                if clean.dtype == torch.float16
                else "A wider type does not help: check the model's weights and the transcoder"
            )
        )
    ce_clean, ce, kl, same_top = numbers
    return Scores(ce_clean, ce, kl, same_top, log_ratio)
