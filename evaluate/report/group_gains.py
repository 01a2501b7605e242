"""groups.js: what each group adds to those before it, and how groups are nested in one another, from hierarchy.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TOKENS = 8
_GAIN = ("group", "n_latents", "prefix_end", "fvu_before", "fvu_after", "share_of_variance", "share_of_rows", "l0")


def group_gains(record: dict[str, Any], text_of: Callable[[int], str]) -> dict[str, Any]:
    """The numbers of hierarchy.json with the text of its tokens."""
    groups = [
        {
            **{name: group.get(name) for name in _GAIN},
            "tokens": [text_of(token["token"]) for token in group.get("top_tokens", [])[:TOKENS]],
            "tokens_per_row": [text_of(token["token"]) for token in group.get("top_tokens_per_row", [])[:TOKENS]],
        }
        for group in record.get("groups", [])
    ]
    return {"groups": groups, "pairs": record.get("pairs", [])}
