"""What pages from the disk search in: fires-N.js, one of which knows a token, and text-N.js, all windows once.

fires-N.js    {keys, latents, shares}: the tokens whose `bucket` is N; a search reads the files of its words alone
text-N.js     [text, [latent, first, length, ...]] of stretches of contexts, all three once a window: in characters of
              UTF-16, as JavaScript counts them; first is from that of the window before
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .data_file import write_data
from .window_search import PARTS, FiringTokens, Ints, WindowIndex, WindowTexts

ENTRIES_PER_FILE = 16_384
"""Of fires-N.js, on average; about 130 KB."""
TEXT_FILE_SIZE = 1_000_000
"""Characters and numbers of a text-N.js, after which it is closed."""


def write_search(folder: Path, index: WindowIndex) -> dict[str, int]:
    """Write both; returns what a page must know before it reads them."""
    return {
        "n_fires_files": _write_fires(folder, index.firing),
        "n_text_files": _write_texts(folder, index.contexts),
        "share_parts": PARTS,
    }


def bucket(key: str, n_files: int) -> int:
    """The file that knows the token `key`: FNV-1a over its units of UTF-16, as in assets/search.js."""
    value = 0x811C9DC5
    for unit in np.frombuffer(key.encode("utf-16-le"), "<u2").tolist():
        value = ((value ^ unit) * 0x01000193) & 0xFFFFFFFF
    return value % n_files


def _write_fires(folder: Path, firing: FiringTokens) -> int:
    n_files = max(1, -(-len(firing.latents) // ENTRIES_PER_FILE))
    # Lists, and not an object by token: as a key, the token __proto__ would not be one.
    files: list[dict[str, list[Any]]] = [{"keys": [], "latents": [], "shares": []} for _ in range(n_files)]
    for key, number in sorted(firing.keys.items()):
        span, file = slice(firing.starts[number], firing.starts[number + 1]), files[bucket(key, n_files)]
        file["keys"].append(key)
        file["latents"].append(firing.latents[span].tolist())
        file["shares"].append(firing.shares[span].tolist())
    for number, content in enumerate(files):
        write_data(folder, f"fires-{number}", content)
    return n_files


def _write_texts(folder: Path, contexts: WindowTexts) -> int:
    part: list[Any] = []
    size = n_files = 0
    for i, text in enumerate(contexts.texts):
        span = slice(contexts.starts[i], contexts.starts[i + 1])
        units = _units_before(text)
        first, end = units[contexts.first[span]], units[contexts.end[span]]
        columns = contexts.latents[span], np.diff(first, prepend=0), end - first
        part.append([text, np.stack(columns, axis=1).flatten().tolist()])
        size += len(text) + 3 * len(first)
        if size >= TEXT_FILE_SIZE or i == len(contexts.texts) - 1:
            write_data(folder, f"text-{n_files}", part)
            part, size, n_files = [], 0, n_files + 1
    return n_files


def _units_before(text: str) -> Ints:
    """[len(text) + 1] units of UTF-16 before each character."""
    beyond = np.frombuffer(text.encode("utf-32-le"), "<u4") > 0xFFFF
    return np.concatenate([[0], np.cumsum(1 + beyond.astype(np.int64))])
