"""Search in the saved windows of all latents: those that fire on a word, and those that have it anywhere in a window.

The pages from the disk ask the same of files (search_files.py, assets/search.js); a test holds the answers together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryoshka.errors import UserError

from ..analyses.samples.files import WINDOWS_FILE

MAX_QUERY = 200
FIRES, CONTEXTS = "fires", "contexts"
PARTS = 10_000
"""Shares are whole numbers of this: the files and the server sort by the same ones."""
BLANK = "\N{OPEN BOX}"
"""A token of spaces alone."""
_SPACES = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))
"""What JavaScript trims, so that both sides cut alike."""
_KINDS = ("top", "decile")

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Found:
    """Latents in the order in which they are shown."""

    latents: list[int]
    shares: list[int] | None
    """How much of a latent's activation falls on the words, in PARTS; None where firing was not asked for."""


@dataclass(frozen=True, slots=True)
class FiringTokens:
    """Which latents fire on a token, and how much of their activation falls on it."""

    keys: Mapping[str, int]
    """Token as it is looked for -> its number."""
    starts: Ints
    """[n_keys + 1]: entries starts[i] to starts[i + 1] are of token i, by falling share, then by latent."""
    latents: Ints
    shares: Ints

    def find(self, query: str) -> Found:
        """Latents that fire on one of the words of `query`, by the share of their activation on all of them."""
        sums: dict[int, int] = {}
        for word in dict.fromkeys(words_of(query)):
            if word in self.keys:
                span = slice(self.starts[self.keys[word]], self.starts[self.keys[word] + 1])
                for latent, share in zip(self.latents[span].tolist(), self.shares[span].tolist(), strict=True):
                    sums[latent] = sums.get(latent, 0) + share
        latents = sorted(sums, key=lambda latent: (-sums[latent], latent))
        return Found(latents, [sums[latent] for latent in latents])


@dataclass(frozen=True, slots=True)
class WindowTexts:
    """The text of all windows, that of overlapping ones once."""

    texts: list[str]
    """Of each stretch of a context that windows cover."""
    starts: Ints
    """[n_texts + 1]: windows starts[i] to starts[i + 1] are parts of text i, by their first character."""
    latents: Ints
    first: Ints
    """[n_windows] first character in its text."""
    end: Ints
    """[n_windows] the character after its last."""

    def find(self, query: str) -> Found:
        """Latents with a window that holds `query` as it is, spaces at its ends apart, in rising order."""
        wanted, found = normal(query), set[int]()
        for i, text in enumerate(self.texts if wanted else ()):
            occurrences = np.array(_occurrences(text, wanted))
            if len(occurrences):
                span = slice(self.starts[i], self.starts[i + 1])
                at = np.searchsorted(occurrences, self.first[span])
                last = self.end[span] - len(wanted)
                holds = (at < len(occurrences)) & (occurrences[np.minimum(at, len(occurrences) - 1)] <= last)
                found.update(self.latents[span][holds].tolist())
        return Found(sorted(found), None)


@dataclass(frozen=True, slots=True)
class WindowIndex:
    """Both, in memory: about 300 bytes a latent, and the text of the split as far as windows cover it."""

    firing: FiringTokens
    contexts: WindowTexts

    @classmethod
    def read(cls, samples: Path, text_of: Callable[[int], str]) -> WindowIndex:
        """Of the samples in the folder `samples`. Raises UserError when they cannot be read."""
        text = cache(lambda token: lowered(text_of(token)))
        return cls(_firing(samples, text), _texts(samples, text))

    def find(self, query: str, where: str = FIRES) -> Found:
        """Latents that fire on the words (FIRES) or have them in a window (CONTEXTS). Raises UserError for another."""
        if len(query) > MAX_QUERY:
            raise UserError(f"a search may have {MAX_QUERY} characters at most")
        if where not in (FIRES, CONTEXTS):
            raise UserError(f"a search is in {FIRES!r} or in {CONTEXTS!r}, not in {where[:20]!r}")
        return (self.firing if where == FIRES else self.contexts).find(query)


def lowered(text: str) -> str:
    """Letters that look alike made one: composed, in lower case."""
    return unicodedata.normalize("NFC", text).lower()


def normal(query: str) -> str:
    """What is looked for: without the spaces around it, and whatever its case."""
    return lowered(query.strip(_SPACES))


def words_of(query: str) -> list[str]:
    """The tokens that a query names."""
    spaced = "".join(" " if char in _SPACES else char for char in query)
    return [word for word in normal(spaced).split(" ") if word]


def _occurrences(text: str, wanted: str) -> list[int]:
    """Where `wanted` begins in `text`, overlapping ones too."""
    occurrences, at = [], text.find(wanted)
    while at >= 0:
        occurrences.append(at)
        at = text.find(wanted, at + 1)
    return occurrences


@dataclass(frozen=True, slots=True)
class _Windows:
    """Windows of whole latents in which these fire, and their tokens one after another."""

    latent: Ints
    context: Ints
    start: Ints
    """[n] position of the first token in its context."""
    length: Ints
    tokens: Ints
    acts: NDArray[np.float64]

    def per_token(self, column: Ints) -> Ints:
        """A value a window -> one a token."""
        return np.repeat(column, self.length)

    def positions(self) -> Ints:
        """Of each token, in its context."""
        return np.arange(len(self.tokens)) - self.per_token(np.cumsum(self.length) - self.length - self.start)


def _read(samples: Path) -> Iterator[_Windows]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["latent", "kind", "context", "position", "peak", "tokens", "acts"]
    path = samples / WINDOWS_FILE
    try:
        file = pq.ParquetFile(path)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=names)
            table = table.filter(pc.field("kind").isin(_KINDS)).combine_chunks()
            if len(table):
                column = {name: table[name].combine_chunks() for name in names}
                at = {
                    name: column[name].to_numpy().astype(np.int64) for name in ("latent", "context", "position", "peak")
                }
                lists = column["tokens"]
                yield _Windows(
                    at["latent"],
                    at["context"],
                    at["position"] - at["peak"],
                    np.diff(lists.offsets.to_numpy()).astype(np.int64),
                    lists.flatten().to_numpy().astype(np.int64),
                    column["acts"].flatten().to_numpy().astype(np.float64),
                )
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({error}); run evaluate samples again") from error


def _firing(samples: Path, text: Callable[[int], str]) -> FiringTokens:
    keys: dict[str, int] = {}
    found: list[Any] = []
    for windows in _read(samples):
        fires = windows.acts > 0
        latent, tokens, acts = windows.per_token(windows.latent)[fires], windows.tokens[fires], windows.acts[fires]
        # A row that several windows of a latent hold counts once.
        rows = np.stack([latent, windows.per_token(windows.context)[fires], windows.positions()[fires]])
        once = _first_of_each(rows)
        latent, tokens, acts = latent[once], tokens[once], acts[once]
        total = np.bincount(latent, weights=acts)
        ids, which = np.unique(tokens, return_inverse=True)
        key = np.array([keys.setdefault(_key(text(token)), len(keys)) for token in ids.tolist()], np.int64)[which]
        pairs, which = np.unique(key * len(total) + latent, return_inverse=True)
        key, latent = pairs // len(total), pairs % len(total)
        share = np.bincount(which, weights=acts, minlength=len(pairs)) / total[latent]
        found.append([key, latent, np.maximum(1, np.rint(share * PARTS)).astype(np.int64)])
    key, latent, share = np.concatenate(found, axis=1) if found else np.zeros((3, 0), np.int64)
    order = np.lexsort((latent, -share, key))
    starts = np.searchsorted(key[order], np.arange(len(keys) + 1))
    return FiringTokens(keys, starts, latent[order], share[order])


def _key(text: str) -> str:
    return text.strip(_SPACES) or BLANK


def _first_of_each(rows: Ints) -> Ints:
    """The index of the first of each distinct column of `rows` [k, n]."""
    order = np.lexsort(rows)
    is_new = np.any(np.diff(rows[:, order], axis=1) != 0, axis=0)
    return order[np.concatenate([[True], is_new])[: len(order)]]


def _texts(samples: Path, text: Callable[[int], str]) -> WindowTexts:
    columns = [np.stack([w.latent, w.context, w.start, w.length]) for w in _read(samples)]
    if not columns:
        none = np.zeros(0, np.int64)
        return WindowTexts([], np.zeros(1, np.int64), none, none, none)
    latent, context, start, length = np.concatenate(columns, axis=1)
    order = np.lexsort((start + length, start, context))
    latent, context, start, stop = (column[order] for column in (latent, context, start, start + length))
    # Windows that overlap are of one stretch: a new one begins behind the end of all before it.
    beyond = (context + 1) * (int(stop.max()) + 1)
    reach = np.maximum.accumulate(beyond + stop)
    begins = np.concatenate([[True], (beyond + start)[1:] > reach[:-1]])
    stretch = np.cumsum(begins) - 1
    origin, n_tokens = start[begins], reach[np.append(np.flatnonzero(begins)[1:] - 1, -1)] - (beyond + start)[begins]
    offset = np.concatenate([[0], np.cumsum(n_tokens)])
    # In the order of the file, in which the tokens are read.
    target = np.empty_like(start)
    target[order] = offset[stretch] + start - origin[stretch]
    tokens, done = np.full(int(offset[-1]), -1, np.int64), 0
    for windows in _read(samples):
        cells = windows.per_token(target[done : done + len(windows.latent)] - windows.start) + windows.positions()
        tokens[cells] = windows.tokens
        done += len(windows.latent)
    words = [text(token) for token in tokens.tolist()]
    chars = np.concatenate([[0], np.cumsum([len(word) for word in words])])
    first, end = (chars[offset[stretch] + at - origin[stretch]] - chars[offset[stretch]] for at in (start, stop))
    once = np.sort(_first_of_each(np.stack([latent, first, end, stretch])))
    return WindowTexts(
        ["".join(words[a:b]) for a, b in pairwise(offset.tolist())],
        np.searchsorted(stretch[once], np.arange(len(n_tokens) + 1)),
        latent[once],
        first[once],
        end[once],
    )
