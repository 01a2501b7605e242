"""What is known of a row or a document without a model: the label sets of `evaluate probing`.

first_letter    of whole words that are one token; a class a letter
token_kind      punctuation, digits, lower-case word, capitalised word, upper-case word, white space, other
document_start  whether the token is among the first 16 of its document (only where the document starts in the context)
labels file     {"doc_id": 17, "label": "sport"} a line, or Parquet with these columns: of whole documents

Tokens of one kind are few and frequent, so train and test never share a token's text, and each text gives at most
`per_token` rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.tokens import TokenTexts

DOCUMENT_START = 16


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows of one split with their classes."""

    context: Tensor
    """[rows] int64"""
    position: Tensor
    """[rows] int64"""
    label: Tensor
    """[rows] int64, index into the label set's classes"""


def token_kind(text: str) -> str:
    """The kind of a token's text, space before and after it left out."""
    bare = text.strip()
    if not bare:
        return "white space"
    if bare.isdecimal():
        return "digits"
    if bare.isalpha():
        if bare.islower():
            return "lower-case word"
        if bare.isupper() and len(bare) > 1:
            return "upper-case word"
        return "capitalised word" if bare[0].isupper() and (len(bare) == 1 or bare[1:].islower()) else "other"
    return "punctuation" if all(char.isascii() and not char.isalnum() for char in bare) else "other"


def token_kinds(texts: TokenTexts, tokens: Tensor) -> tuple[list[str | None], list[str]]:
    """Kind and bare text of every token id in `tokens`; entries of other ids are None and empty."""
    used = torch.unique(tokens).tolist()
    kinds: list[str | None] = [None] * (max(used) + 1)
    bare = [""] * len(kinds)
    for token in used:
        text = texts.text(token)
        kinds[token], bare[token] = token_kind(text), text.strip().lower()
    return kinds, bare


def document_starts(doc_ids: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(known, starts), bool [contexts, ctx_len] each: where the place in the document is known, and below 16.

    A document that was under way when the context began may have begun any number of contexts before.
    """
    position = np.zeros(doc_ids.shape, dtype=np.int64)
    known = np.zeros(doc_ids.shape, dtype=bool)
    for p in range(1, doc_ids.shape[1]):
        goes_on = doc_ids[:, p] == doc_ids[:, p - 1]
        position[:, p] = np.where(goes_on, position[:, p - 1] + 1, 0)
        known[:, p] = np.where(goes_on, known[:, p - 1], True)
    return known & keep, known & keep & (position < DOCUMENT_START)


def read_labels(path: Path) -> dict[int, str]:
    """doc_id -> label, from JSON lines or Parquet. Raises UserError for whatever is wrong with the file."""
    if not path.is_file():
        raise UserError(f"there is no labels file {path}; give JSON lines or Parquet with doc_id and label")
    rows = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    labels: dict[int, str] = {}
    for number, (doc_id, label) in rows.items():
        if isinstance(doc_id, bool) or not isinstance(doc_id, int) or not isinstance(label, str | int | bool):
            raise UserError(
                f"row {number} of {path} has doc_id {doc_id!r} and label {label!r}; a doc_id is a whole number and a "
                "label a word or a whole number"
            )
        if labels.setdefault(doc_id, str(label)) != str(label):
            raise UserError(f"row {number} of {path} gives document {doc_id} a second label; keep one")
    if len(set(labels.values())) < 2:
        raise UserError(f"{path} has {len(set(labels.values()))} label(s); a probe needs two to tell apart")
    return labels


def _json_lines(path: Path) -> Mapping[int, tuple[object, object]]:
    rows: dict[int, tuple[object, object]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            rows[number] = (content["doc_id"], content["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'line {number} of {path} is not like {{"doc_id": 17, "label": "sport"}}: {line[:60]!r}'
            ) from error
    return rows


def _parquet(path: Path) -> Mapping[int, tuple[object, object]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        columns = pq.read_table(path, columns=["doc_id", "label"]).to_pydict()
        return dict(enumerate(zip(columns["doc_id"], columns["label"], strict=True)))
    except (OSError, ArrowInvalid, KeyError) as error:
        raise UserError(f"{path} cannot be read as Parquet with the columns doc_id and label: {error}") from error
