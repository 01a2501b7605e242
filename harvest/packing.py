"""Documents -> contexts -> jobs of one shard each: pure functions of the text and the settings.

1. A document is tokenised and cut into blocks of 16 contexts; each block goes to train or val by its hash.
2. The blocks of a split are laid end to end and cut into contexts of BOS + ctx_len - 1 tokens: no token is lost
   between contexts, and each token keeps the number of its document. Unpacked, every document starts a context and
   its last context is filled up with a special token, which attention never sees from before and training leaves out.
3. Contexts fill shards in order. The jobs come out in one fixed order, so a resumed harvest meets the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from matryoshka.shards import SplitPlan

BLOCK_CONTEXTS = 16
"""Contexts of one document that share a split: a corpus of a few books still gets a val part."""
_TOKENIZE_BATCH = 64

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

    @property
    def text_len(self) -> int:
        """Text tokens in a context."""
        return self.ctx_len - (self.bos_id is not None)


def shard_jobs(
    documents: Iterable[str], tokenize: Tokenize, packing: Packing, plans: Mapping[str, SplitPlan]
) -> Iterator[ShardJob]:
    """Yield the jobs of every planned shard, in the order in which the text fills them.

    When the text ends early, what is left of each split comes as a last, smaller shard (whole contexts only).
    """
    packers = {split: _Packer(split, packing, plan.shard_contexts) for split, plan in plans.items()}
    for doc_id, (text, ids) in enumerate(_tokenized(documents, tokenize)):
        if all(packer.is_full for packer in packers.values()):
            return
        document = hashlib.blake2b(text.encode(), digest_size=16).digest()
        ids = ids[: packing.max_doc_tokens]
        block_len = BLOCK_CONTEXTS * packing.text_len
        for number, start in enumerate(range(0, len(ids), block_len)):
            split = assign_split(document, number, packing)
            yield from packers[split].add(np.asarray(ids[start : start + block_len], np.int32), doc_id)
    for packer in packers.values():
        yield from packer.flush()


def assign_split(document: bytes, block: int, packing: Packing) -> str:
    """train or val, from the hash of a document's text, the number of the block in it, and the seed."""
    key = document + block.to_bytes(8, "little") + packing.seed.to_bytes(8, "little", signed=True)
    draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64
    return "val" if draw < packing.val_fraction else "train"


def _tokenized(documents: Iterable[str], tokenize: Tokenize) -> Iterator[tuple[str, list[int]]]:
    iterator = iter(documents)
    while texts := list(islice(iterator, _TOKENIZE_BATCH)):
        yield from zip(texts, tokenize(texts), strict=True)


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
