"""What zeroing one latent did, from ablations/<latent>.json to its page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TOKENS = 10


def ablation_facts(content: dict[str, Any], text_of: Callable[[int], str]) -> dict[str, Any]:
    """The numbers of the file, and its tokens as text: {"numbers": {name: value}, "raised": [[text, effect]], ...}."""
    numbers = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in content.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("format_version", "latent")
    }
    sides = {side: _tokens(content.get(side), text_of) for side in ("raised", "lowered")}
    return {"numbers": numbers, **sides}


def _tokens(rows: Any, text_of: Callable[[int], str]) -> list[list[Any]]:
    pairs = [(row["token"], row["effect"]) for row in rows or ()]
    return [[text_of(token), float(f"{effect:.4g}")] for token, effect in pairs[:TOKENS]]
