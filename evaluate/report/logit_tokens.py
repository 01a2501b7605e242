"""The tokens whose logits a latent raises and lowers most, for the filter of the browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..analyses.logits.logits import LogitTokens


def logit_table(tokens: LogitTokens, text_of: Callable[[int], str]) -> dict[str, Any]:
    """logits.js: each token's text once, then for each latent the places in `texts` of its tokens."""
    index_of: dict[str, int] = {}

    def indices(pairs: list[tuple[int, float]]) -> list[int]:
        return [index_of.setdefault(text_of(token), len(index_of)) for token, _ in pairs]

    raised, lowered = [], []
    for latent in range(tokens.d_sae):
        up, down = tokens.of(latent)
        raised.append(indices(up))
        lowered.append(indices(down))
    return {"texts": list(index_of), "raised": raised, "lowered": lowered}
