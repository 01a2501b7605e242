"""Token ids as text that a terminal or a page can show."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.tokens import TokenTexts


def token_text(
    recorded: str, revision: str | None, folder: Path, named: str | None, note: Callable[[str], None]
) -> Callable[[int], str]:
    """A function from a token id to its text, by the tokenizer that is `named`, else by the `recorded` one.

    To its number when the recorded one cannot be had; `note` reports that. Raises UserError when a named one cannot.
    """
    try:
        texts = TokenTexts.read(named or recorded, revision=revision, near=folder)
    except UserError as error:
        if named is not None:
            raise
        note(f"token ids are shown, not text: {error}")
        return lambda token: f"[{token}]"
    return texts.text


def visible(text: str) -> str:
    """The text with what is not printable made so: newlines and tabs as symbols, other controls as U+FFFD."""
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") else char for char in text)
