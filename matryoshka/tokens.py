"""What the tokens of a language model say, without loading the model: only its tokenizer.json is read.

Each token stands for some bytes of UTF-8; a character outside ASCII can be spread over several tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.locations import expand

TOKENIZER_FILE = "tokenizer.json"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenTexts:
    """The bytes of each token of a vocabulary."""

    def __init__(self, tokenizer: Any, *, byte_level: bool) -> None:
        """Use `read`. `tokenizer` is a `tokenizers.Tokenizer`."""
        self._tokenizer = tokenizer
        self._bytes_of = _byte_alphabet() if byte_level else None
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    @classmethod
    def read(cls, name: str, *, revision: str | None = None, near: Path | None = None) -> TokenTexts:
        """The tokenizer called `name`: a folder, or a repository of the hub or its cache.

        A relative folder is also looked for from every folder above `near`. Raises UserError when it cannot be had.
        """
        from tokenizers import Tokenizer

        file = _find(expand(name), revision, near)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} cannot be read as a tokenizer: {error}") from error
        return cls(tokenizer, byte_level=_is_byte_level(file))

    def raw(self, token: int) -> bytes:
        """Bytes of one token; those of its name in brackets when the vocabulary does not hold it."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return f"[{token}]".encode()
        if token in self._special:
            return piece.encode()
        alphabet = self._bytes_of
        if alphabet is not None:
            return b"".join([alphabet[char] if char in alphabet else char.encode() for char in piece])
        match = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match is not None else piece.replace(_METASPACE, " ").encode()

    def text(self, token: int) -> str:
        """Text of one token alone; bytes that are no whole character become U+FFFD."""
        return self.raw(token).decode("utf-8", errors="replace")


def _find(name: str, revision: str | None, near: Path | None) -> Path:
    starts = [Path(), *(near.resolve().parents if near is not None and not Path(name).is_absolute() else ())]
    for start in starts:
        if (start / name / TOKENIZER_FILE).is_file():
            return start / name / TOKENIZER_FILE
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, TOKENIZER_FILE, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the tokenizer {name!r} cannot be had: there is no such folder with a {TOKENIZER_FILE} here, and the hub "
            f"says: {reason}. Name it with --tokenizer"
        ) from error


def _is_byte_level(file: Path) -> bool:
    """Whether the pieces are written in the byte alphabet of GPT-2."""
    import json

    content = json.loads(file.read_text(encoding="utf-8"))
    parts = [content.get("decoder"), content.get("pre_tokenizer")]
    return any('"ByteLevel"' in json.dumps(part) for part in parts)


def _byte_alphabet() -> dict[str, bytes]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
