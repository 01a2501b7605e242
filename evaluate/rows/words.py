"""Whole words in the contexts of a shard set, each a single token, and the letter each begins with.

SAEBench asks a model to spell: "{word} has the first letter:". A shard set holds running text instead, so the rows here
are occurrences of words that are one token. What is known of such a row without any model is its first letter.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka.shards import ShardSet, Split
from matryoshka.tokens import TokenTexts

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r" ?([A-Za-z]+)")
_HELD_OUT = 2**32


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Facts of each token id that occurs, without its context; entry t of an array is about token t."""

    word: list[str | None]
    """The token's text in lower case without its space, where that is letters a to z alone."""
    has_space: np.ndarray
    """bool: its text begins with white space."""
    begins_joined: np.ndarray
    """bool: its text begins with a letter or digit, so that it continues a word before it."""
    ends_joined: np.ndarray
    """bool: it ends with one, so that a token without a space continues it."""


@dataclass(frozen=True, slots=True)
class WordPositions:
    """Positions of rows in a split, and the word of each; entry i of one is entry i of all."""

    context: Tensor
    """[rows] int64, number of the context in its split"""
    position: Tensor
    """[rows] int64"""
    word: Tensor
    """[rows] int64, index into `words`"""
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.context)

    def letters(self) -> Tensor:
        """First letter of each row's word, int64 [rows], a = 0."""
        first = torch.tensor([LETTERS.index(word[0]) for word in self.words], dtype=torch.int64)
        return first[self.word]


def token_table(texts: TokenTexts, tokens: Tensor) -> TokenTable:
    """The table of all ids in `tokens`."""
    used = torch.unique(tokens).tolist()
    size = max(used) + 1
    word: list[str | None] = [None] * size
    space, begins, ends = (np.zeros(size, dtype=bool) for _ in range(3))
    for token in used:
        text = texts.text(token)
        match = _WORD.fullmatch(text)
        word[token] = None if match is None else match[1].lower()
        # A token that is only some bytes of a character decodes to U+FFFD: it may well be part of a letter.
        space[token] = text[:1].isspace()
        begins[token], ends[token] = (char.isalnum() or char == "\N{REPLACEMENT CHARACTER}" for char in _edges(text))
    return TokenTable(word=word, has_space=space, begins_joined=begins, ends_joined=ends)


def _edges(text: str) -> tuple[str, str]:
    return text[:1], text[-1:]


def whole_words(table: TokenTable, tokens: np.ndarray, doc_ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Where a token is a whole word: bool [contexts, ctx_len], as are all arguments.

    The word must begin here (its token brings the space, or something that is no letter or digit comes before it in
    the document) and must end here (the next token of the document begins with something else). What is outside the
    context is not known, so a word at its edge does not count unless its own space says that it begins there.
    """
    is_word = np.array([word is not None for word in table.word])[tokens] & keep
    same_document = doc_ids[:, 1:] == doc_ids[:, :-1]
    begins, ends = np.zeros_like(is_word), np.zeros_like(is_word)
    begins[:, 1:] = ~same_document | (keep[:, :-1] & ~table.ends_joined[tokens[:, :-1]])
    begins |= table.has_space[tokens]
    ends[:, :-1] = ~same_document | ~keep[:, 1:] | ~table.begins_joined[tokens[:, 1:]]
    return is_word & begins & ends


def is_test_word(word: str, test_share: float, seed: int) -> bool:
    """Whether a word is held out of every probe's training: by a hash, so that it never depends on the other words."""
    return _hash(word, seed) < test_share * _HELD_OUT


def find_words(
    shards: ShardSet, split: Split, texts: TokenTexts, *, limit: int | None, max_words: int, per_word: int, seed: int
) -> WordPositions:
    """The first `per_word` occurrences of each word in the first `limit` positions of a split, context after context.

    With more than `max_words` words those with the smallest hashes are taken: a random choice that grows with max_words
    without changing.
    """
    tokens, doc_ids, keep = split_tokens(split, limit, shards.ctx_len)
    table = token_table(texts, tokens)
    found = whole_words(table, tokens.numpy(), doc_ids.numpy(), keep.numpy())
    contexts, positions = found.nonzero()
    names = [table.word[token] for token in tokens.numpy()[found]]
    known = sorted({name for name in names if name is not None}, key=lambda word: (_hash(word, seed), word))[:max_words]
    number = {name: i for i, name in enumerate(known)}
    seen, chosen = [0] * len(known), []
    for row, name in enumerate(names):
        i = number.get(name or "")
        if i is not None and seen[i] < per_word:
            seen[i] += 1
            chosen.append((row, i))
    rows = np.array([row for row, _ in chosen], dtype=np.int64)
    return WordPositions(
        context=torch.from_numpy(contexts[rows]),
        position=torch.from_numpy(positions[rows]),
        word=torch.tensor([i for _, i in chosen], dtype=torch.int64),
        words=tuple(known),
    )


def split_tokens(split: Split, limit: int | None, ctx_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, doc_ids and keep of the whole contexts in the first `limit` positions: [contexts, ctx_len] each."""
    most = split.n_contexts if limit is None else min(split.n_contexts, max(1, -(-limit // ctx_len)))
    parts, n = [], 0
    for shard in range(split.n_shards):
        if n >= most:
            break
        parts.append((split.tokens(shard), split.doc_ids(shard), split.keep(shard).T))
        n += split.shard_contexts[shard]
    tokens, doc_ids, keep = (torch.cat(part)[:most] for part in zip(*parts, strict=True))
    return tokens, doc_ids, keep


def only(positions: WordPositions, chosen: Tensor) -> WordPositions:
    """The rows that `chosen` [rows] bool marks."""
    return WordPositions(positions.context[chosen], positions.position[chosen], positions.word[chosen], positions.words)


def _hash(word: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{word}".encode()).digest()[:4], "big")
