"""Documents -> contexts -> jobs of one shard each: pure functions of the text and the settings.

1. A hash of a document's text sends it, whole, to train or val (with `val_unit: block`, each 16 contexts of it).
2. The tokens of a split are laid end to end and cut into contexts of BOS + ctx_len - 1 tokens: no token is lost
   between contexts, and each token keeps the number of its document. Unpacked, every document starts a context and
   its last context is filled up with a special token, which attention never sees from before and training leaves out.
3. Contexts fill shards in order. Each split is made from a reading of the text of its own, val first: whether there is
   text for it is known before any of train is made. The order is fixed, so a resumed harvest meets the same jobs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka.held_out import ValUnit
from matryoshka.shards import SplitPlan

SPLIT_ORDER = ("val", "train")
BLOCK_CONTEXTS = 16
"""With `val_unit: block`, contexts of a document that share a split: a corpus of a few books still gets a val part."""
_TOKENIZE_DOCUMENTS = 64
_TOKENIZE_CHARACTERS = 1 << 18
"""At most so much text is tokenised at once, since that takes about 200 bytes a character; more of it goes in parts."""
_CUTS = (re.compile(r"(?<=\S) (?=\S)"), re.compile(r"\s"))
"""Where a long text may be cut, the best first: words keep their space in front, as tokenizers have them."""
_CUT_WINDOW = 4096

Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """The contexts of one shard, ready for the language model."""

    split: str
    shard: int
    tokens: Tensor
    """[n_contexts, ctx_len] int32"""
    doc_ids: Tensor
    """[n_contexts, ctx_len] int32; the BOS position carries the document of the token after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How text becomes contexts."""

    ctx_len: int
    bos_id: int | None
    """First token of every context; None for a model without one."""
    val_fraction: float
    seed: int
    pad_id: int | None = None
    """Fills up the last context of each document; None lays documents end to end."""
    max_doc_tokens: int | None = None
    """Tokens of a document beyond these are left out."""
    val_unit: ValUnit = "document"
    """What is held out: whole documents, or blocks of BLOCK_CONTEXTS contexts of any document."""

    @property
    def text_len(self) -> int:
        """Text tokens in a context."""
        return self.ctx_len - (self.bos_id is not None)


@dataclass(frozen=True, slots=True)
class _Document:
    """A document and its number in the whole text."""

    number: int
    text: str
    hash: bytes


def split_jobs(
    split: str, texts: Iterable[str], tokenize: Tokenize, packing: Packing, plan: SplitPlan
) -> Iterator[ShardJob]:
    """Yield the jobs of every planned shard of one split, in the order in which the text fills them.

    `texts` are the documents of all splits, read no further than needed. When they end early, what is left comes as a
    last, smaller shard (whole contexts only).
    """
    packer = _Packer(split, packing, plan.shard_contexts)
    for document, ids in _tokenized(_documents_of(split, texts, packing), tokenize, packing.max_doc_tokens):
        for part in _parts_of(split, document, ids, packing):
            yield from packer.add(part, document.number)
        if packer.is_full:
            return
    yield from packer.flush()


def assign_split(document: bytes, block: int, packing: Packing) -> str:
    """train or val, from the hash of a document's text, the number of the block in it, and the seed.

    A whole document goes where its first block, 0, goes.
    """
    key = document + block.to_bytes(8, "little") + packing.seed.to_bytes(8, "little", signed=True)
    draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64
    return "val" if draw < packing.val_fraction else "train"


def document_hash(text: str) -> bytes:
    """What decides the split of a document."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _documents_of(split: str, texts: Iterable[str], packing: Packing) -> Iterator[_Document]:
    """The documents that may have tokens of `split`."""
    for number, text in enumerate(texts):
        document = _Document(number, text, document_hash(text))
        if packing.val_unit == "block" or assign_split(document.hash, 0, packing) == split:
            yield document


def _parts_of(split: str, document: _Document, ids: np.ndarray, packing: Packing) -> Iterator[np.ndarray]:
    """Those tokens of a document that belong to `split`."""
    if packing.val_unit == "document":
        yield ids
        return
    block_len = BLOCK_CONTEXTS * packing.text_len
    for number, start in enumerate(range(0, len(ids), block_len)):
        if assign_split(document.hash, number, packing) == split:
            yield ids[start : start + block_len]


def _tokenized(
    documents: Iterable[_Document], tokenize: Tokenize, most: int | None
) -> Iterator[tuple[_Document, np.ndarray]]:
    """Each document with its first `most` token ids, int32."""
    for batch in _batches(documents):
        if len(batch[0].text) > _TOKENIZE_CHARACTERS:
            yield batch[0], _ids_of_long(batch[0].text, tokenize, most)
        else:
            ids = tokenize([document.text for document in batch])
            yield from ((document, np.asarray(i[:most], np.int32)) for document, i in zip(batch, ids, strict=True))


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Documents to tokenise together; one that is too long for that comes alone."""
    batch: list[_Document] = []
    size = 0
    for document in documents:
        if batch and (len(batch) == _TOKENIZE_DOCUMENTS or size + len(document.text) > _TOKENIZE_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


def _ids_of_long(text: str, tokenize: Tokenize, most: int | None) -> np.ndarray:
    """The token ids of a long text, part after part, until there are `most`."""
    found, n_found = [], 0
    for part in cut_text(text, _TOKENIZE_CHARACTERS):
        found.append(np.asarray(tokenize([part])[0], np.int32))
        n_found += len(found[-1])
        if most is not None and n_found >= most:
            break
    return np.concatenate(found)[:most]


def cut_text(text: str, size: int) -> Iterator[str]:
    """The text in parts of at most `size` characters, cut before single spaces where there are any.

    The tokens are those of the whole text but for tokenizers that put something before each text (Llama-2's adds a
    space) or whose tokens span words: these may differ by a token at each cut.
    """
    start = 0
    while len(text) - start > size:
        first = max(start + 1, start + size - _CUT_WINDOW)
        # One character further, since a cut is judged by what comes after it.
        ways = ([m.start() for m in cut.finditer(text, first, start + size + 1)] for cut in _CUTS)
        stop = next((found[-1] for found in ways if found), start + size)
        yield text[start:stop]
        start = stop
    yield text[start:]


class _Packer:
    """Lays blocks of tokens end to end and cuts them into the contexts and shards of one split."""

    def __init__(self, split: str, packing: Packing, shard_contexts: tuple[int, ...]) -> None:
        self._split = split
        self._packing = packing
        self._shard_contexts = shard_contexts
        self._shard = 0
        self._tokens: list[np.ndarray] = []
        self._doc_ids: list[np.ndarray] = []
        self._n_tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether every planned shard has been filled."""
        return self._shard == len(self._shard_contexts)

    def add(self, tokens: np.ndarray, doc_id: int) -> Iterator[ShardJob]:
        """Take one block; yield the shards it completes. Text beyond the last planned shard is left out."""
        if self.is_full:
            return
        if self._packing.pad_id is not None:
            room = -len(tokens) % self._packing.text_len
            tokens = np.pad(tokens, (0, room), constant_values=self._packing.pad_id)
        self._tokens.append(tokens)
        self._doc_ids.append(np.full(len(tokens), doc_id, np.int32))
        self._n_tokens += len(tokens)
        while not self.is_full and self._n_tokens >= self._shard_contexts[self._shard] * self._packing.text_len:
            yield self._cut(self._shard_contexts[self._shard])

    def flush(self) -> Iterator[ShardJob]:
        """The whole contexts that are left when the text has ended."""
        n_contexts = self._n_tokens // self._packing.text_len
        if not self.is_full and n_contexts:
            yield self._cut(n_contexts)

    def _cut(self, n_contexts: int) -> ShardJob:
        length = n_contexts * self._packing.text_len
        tokens, doc_ids = np.concatenate(self._tokens), np.concatenate(self._doc_ids)
        self._tokens, self._doc_ids = [tokens[length:]], [doc_ids[length:]]
        self._n_tokens -= length
        job = ShardJob(
            split=self._split,
            shard=self._shard,
            tokens=self._contexts(tokens[:length], n_contexts, bos=self._packing.bos_id),
            doc_ids=self._contexts(doc_ids[:length], n_contexts, bos=None),
        )
        self._shard += 1
        return job

    def _contexts(self, flat: np.ndarray, n_contexts: int, bos: int | None) -> Tensor:
        rows = flat.reshape(n_contexts, self._packing.text_len)
        if self._packing.bos_id is not None:
            first = rows[:, :1] if bos is None else np.full((n_contexts, 1), bos, np.int32)
            rows = np.concatenate([first, rows], axis=1)
        return torch.from_numpy(np.ascontiguousarray(rows))
