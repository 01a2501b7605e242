"""The tokens whose logits a latent raises and lowers most, for the filter of the browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..analyses.logits.logits import LogitTokens


def logit_table(tokens: LogitTokens, text_of: Callable[[int], str]) -> dict[str, Any]:
    """logits.js: each token's text once, then for each latent the places in `texts` of its tokens."""
    places: dict[str, int] = {}

    def place(pairs: list[tuple[int, float]]) -> list[int]:
        return [places.setdefault(text_of(token), len(places)) for token, _ in pairs]

    raised, lowered = [], []
    for latent in range(tokens.d_sae):
        up, down = tokens.of(latent)
        raised.append(place(up))
        lowered.append(place(down))
    return {"texts": list(places), "raised": raised, "lowered": lowered}
