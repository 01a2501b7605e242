"""From labels to examples: which rows of the two sides of a probe, or which documents, and their inputs and codes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.tokens import TokenTexts
from matryoshka.transcoder import Transcoder

from ...analysis import Progress
from ...config import EvaluateConfig
from ...measures.row_acts import RowActs, encode_rows
from ...rows.gather import gather_source
from ...rows.words import split_tokens, token_table, whole_words
from .labels import LabelledRows, document_starts, token_kinds


@dataclass(frozen=True, slots=True)
class Side:
    """The train or test side of a label set; row i of one is row i of all."""

    x: Tensor
    """[rows, d_in] float32, on the CPU"""
    codes: RowActs
    label: Tensor
    """[rows] int64, index into the classes"""


@dataclass(frozen=True, slots=True)
class Found:
    """Labelled rows of a split before they are read: candidates in reading order, with the text each belongs to."""

    context: np.ndarray
    position: np.ndarray
    label: list[str]
    """Name of the class."""
    key: list[str]
    """What must not be on both sides."""


def token_rows(name: str, shards: ShardSet, texts: TokenTexts, split: str, limit: int | None) -> Found:
    """All rows of the first `limit` positions of a split that the label set `name` has a class for."""
    tokens, doc_ids, keep = split_tokens(shards.split(split), limit, shards.ctx_len)
    ids = tokens.numpy()
    if name == "document_start":
        known, starts = document_starts(doc_ids.numpy(), keep.numpy())
        contexts, positions = known.nonzero()
        label = ["first 16 tokens" if start else "later" for start in starts[known]]
        return Found(contexts, positions, label, [f"document {doc}" for doc in doc_ids.numpy()[known]])
    if name == "first_letter":
        table = token_table(texts, tokens)
        chosen = whole_words(table, ids, doc_ids.numpy(), keep.numpy())
        bare = [table.word[token] or "" for token in ids[chosen]]
        label = [word[0] for word in bare]
    else:
        kinds, texts_of = token_kinds(texts, tokens)
        chosen = keep.numpy()
        bare = [texts_of[token] for token in ids[chosen]]
        label = [kinds[token] or "" for token in ids[chosen]]
    contexts, positions = chosen.nonzero()
    return Found(contexts, positions, label, bare)


def choose(found: Found, classes: dict[str, int], *, per_key: int, most: int, seed: int) -> LabelledRows:
    """Drawn: at most `per_key` rows of each key of a class, and at most `most` of the class."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(found.key))
    seen: dict[tuple[str, str], int] = {}
    taken: dict[str, int] = {}
    rows = []
    for row in order.tolist():
        label, key = found.label[row], found.key[row]
        if label not in classes or taken.get(label, 0) >= most or seen.get((label, key), 0) >= per_key:
            continue
        seen[label, key] = seen.get((label, key), 0) + 1
        taken[label] = taken.get(label, 0) + 1
        rows.append(row)
    chosen = np.sort(np.array(rows, dtype=np.int64))
    label = torch.tensor([classes[found.label[row]] for row in chosen], dtype=torch.int64)
    return LabelledRows(torch.from_numpy(found.context[chosen]), torch.from_numpy(found.position[chosen]), label)


def keep_side(found: Found, *, held_out: bool, share: float, seed: int) -> Found:
    """The rows whose key is on this side: a share of the keys, by a hash, is held out for the test."""
    side = {key: _held_out(key, share, seed) == held_out for key in set(found.key)}
    chosen = np.array([side[key] for key in found.key], dtype=bool)
    label, keys = (
        [one for one, is_in in zip(names, chosen, strict=True) if is_in] for names in (found.label, found.key)
    )
    return Found(found.context[chosen], found.position[chosen], label, keys)


def is_held_out_document(doc_id: int, share: float, seed: int) -> bool:
    """Whether a document is on the test side, where both sides come from one split."""
    return _held_out(f"document {doc_id}", share, seed)


def read_side(
    rows: LabelledRows, split: str, shards: ShardSet, transcoder: Transcoder, name: str, progress: Progress
) -> Side:
    """Inputs and codes of chosen rows."""
    progress.started(name, len(rows.label))
    source = gather_source(shards.split(split), rows.context, rows.position, shards.d_in, progress.advanced)
    x = _inputs(source, shards, transcoder)
    return Side(x, encode_rows(transcoder, x), rows.label)


def pooled_documents(
    labels: dict[int, int],
    split: str,
    limit: int | None,
    shards: ShardSet,
    transcoder: Transcoder,
    config: EvaluateConfig,
    progress: Progress,
) -> tuple[list[int], Side]:
    """Mean input and mean activations of every labelled document in the first `limit` positions, by document.

    As SAEBench pools its texts: a mean over their tokens, special ones left out. Returns the doc_ids, in order, too.
    """
    tokens, doc_ids, keep = split_tokens(shards.split(split), limit, shards.ctx_len)
    wanted = torch.isin(doc_ids, torch.tensor(sorted(labels), dtype=doc_ids.dtype)) & keep
    contexts, positions = wanted.nonzero(as_tuple=True)
    present, document = torch.unique(doc_ids[wanted], return_inverse=True)
    d_sae = transcoder.config.d_sae
    sums_x = torch.zeros(len(present), shards.d_in, dtype=torch.float64)
    sums_acts = torch.zeros(len(present) * d_sae, dtype=torch.float64)
    progress.started(f"documents ({split})", len(contexts))
    for rows in _tiles(len(contexts), config.batch_rows):
        source = gather_source(shards.split(split), contexts[rows], positions[rows], shards.d_in)
        x = _inputs(source, shards, transcoder)
        codes = encode_rows(transcoder, x)
        sums_x.index_add_(0, document[rows], x.double())
        cell = document[rows][codes.row().cpu()] * d_sae + codes.latent.cpu()
        sums_acts.index_add_(0, cell, codes.value.cpu().double())
        progress.advanced(len(source))
    count = torch.bincount(document, minlength=len(present)).double()[:, None]
    pooled = (sums_acts.view(-1, d_sae) / count).float().to(transcoder.device)
    row, latent = pooled.nonzero(as_tuple=True)
    starts = torch.nn.functional.pad(torch.bincount(row, minlength=len(present)).cumsum(0), (1, 0))
    label = torch.tensor([labels[doc] for doc in present.tolist()], dtype=torch.int64)
    codes = RowActs(d_sae, starts, latent, pooled[row, latent])
    return present.tolist(), Side((sums_x / count).float(), codes, label)


def side_rows(side: Side, chosen: Tensor) -> Side:
    """The rows of a side that `chosen` [rows] bool marks."""
    return Side(side.x[chosen], side.codes.rows(chosen.to(side.codes.latent.device)), side.label[chosen])


def _tiles(n_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, n_rows, size):
        yield slice(start, start + size)


def _inputs(source: Tensor, shards: ShardSet, transcoder: Transcoder) -> Tensor:
    convention = transcoder.config.input
    return apply_convention(source, convention, source_site=shards.manifest.source.site, norm=shards.norm)


def _held_out(key: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32
