"""What the tokens of a language model say, without loading the model: only its tokenizer's files are read.

Each token stands for some bytes of UTF-8; a character outside ASCII can be spread over several tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.locations import expand

TOKENIZER_FILE = "tokenizer.json"
_OTHER_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""What a tokenizer is made of where it has no tokenizer.json."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenTexts:
    """The bytes of each token of a vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        """Of a `tokenizers.Tokenizer`; `read` finds one by its name."""
        self._tokenizer = tokenizer
        self._bytes_of = _byte_alphabet() if _is_byte_level(tokenizer) else None
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    @classmethod
    def read(cls, name: str, *, revision: str | None = None, near: Path | None = None) -> TokenTexts:
        """The tokenizer called `name`: a folder, or a repository of the hub or its cache.

        A relative folder is also looked for from every folder above `near`. Raises UserError when it is not available.
        """
        from tokenizers import Tokenizer

        found = _find(expand(name), revision, near)
        if not isinstance(found, Path):
            return cls(found)
        try:
            tokenizer = Tokenizer.from_file(str(found))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{found} cannot be read as a tokenizer: {error}") from error
        return cls(tokenizer)

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


def _find(name: str, revision: str | None, near: Path | None) -> Any:
    """Path of the tokenizer.json; where there are files of another kind only, what transformers makes of them."""
    starts = [Path(), *(near.resolve().parents if near is not None and not Path(name).is_absolute() else ())]
    for start in starts:
        folder = start / name
        if (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
        if any((folder / file).is_file() for file in _OTHER_FILES):
            return _converted(str(folder), None)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, TOKENIZER_FILE, revision=revision))
    except LocalEntryNotFoundError as error:  # without a network
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _OTHER_FILES):
            return _converted(name, revision)
        raise _not_there(name, error) from error
    except EntryNotFoundError:  # the repository is there, the file is not
        return _converted(name, revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_there(name, error) from error


def _not_there(name: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"the tokenizer {name!r} is not available: there is no such folder with a {TOKENIZER_FILE} here, and the hub "
        f"says: {reason}. Name it with --tokenizer"
    )


def _converted(name: str, revision: str | None) -> Any:
    """The `tokenizers.Tokenizer` that transformers makes of older files, such as OPT's vocab.json and merges.txt."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # its readers of old files raise whatever they come upon
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer {name!r} has no {TOKENIZER_FILE} and cannot be converted: {reason}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"the tokenizer {name!r} has no {TOKENIZER_FILE}, and transformers reads its files as a "
            f"{type(tokenizer).__name__}, whose tokens cannot be written one by one. Name another with --tokenizer"
        )
    return tokenizer.backend_tokenizer


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the pieces are written in the byte alphabet of GPT-2."""
    return any("ByteLevel" in repr(part) for part in (tokenizer.decoder, tokenizer.pre_tokenizer))


def _byte_alphabet() -> dict[str, bytes]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
