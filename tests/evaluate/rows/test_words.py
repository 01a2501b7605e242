"""Which tokens are whole words, how words are split between train and test, and the label sets of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate.analyses.probing.examples import Found, choose, keep_side
from evaluate.analyses.probing.labels import document_starts, read_labels, token_kind
from evaluate.rows.words import is_test_word, token_table, whole_words
from matryoshka.errors import UserError

TEXTS = [
    "<s>",
    " the",
    " cat",
    "s",
    ".",
    " don",
    "'t",
    " 1",
    "st",
    "\n",
    "The",
    "\N{REPLACEMENT CHARACTER}",
    " x1",
    "at",
]


class Texts:
    def text(self, token: int) -> str:
        return TEXTS[token]


def words_of(tokens: list[int], docs: list[int] | None = None) -> list[str]:
    """Texts of the whole words of one context, special token 0."""
    ids = np.array([tokens])
    table = token_table(Texts(), torch.from_numpy(ids))  # pyright: ignore[reportArgumentType]
    doc_ids = np.array([docs or [0] * len(tokens)])
    found = whole_words(table, ids, doc_ids, ids != 0)
    return [TEXTS[token] for token in ids[found]]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0, 1, 2, 4], [" the", " cat"]),
        ([0, 1, 2, 3, 4], [" the"]),  # cat-s goes on
        ([0, 1, 2], [" the"]),  # what follows the context is not known
        ([0, 10, 1, 4], [" the"]),  # The after BOS: the word may have begun before the context
        ([0, 9, 10, 1, 4], ["The", " the"]),  # after a line break it begins
        ([0, 7, 8, 1, 4], [" the"]),  # 1-st is no word
        ([0, 5, 6, 1, 4], [" don", " the"]),
        ([0, 2, 11, 1, 4], [" the"]),  # a piece of a letter follows
        ([0, 12, 1, 4], [" the"]),
        ([0, 4, 13, 4], ["at"]),
    ],
)
def test_whole_words(tokens: list[int], expected: list[str]) -> None:
    assert words_of(tokens) == expected


def test_a_word_ends_with_its_document_and_the_next_begins() -> None:
    assert words_of([0, 2, 3, 4], [0, 0, 0, 0]) == []
    assert words_of([0, 2, 3, 4], [0, 0, 1, 1]) == [" cat", "s"]


def test_the_split_of_words_is_fixed_and_of_the_right_size() -> None:
    words = [f"word{i}" for i in range(4000)]
    held_out = [is_test_word(word, 0.2, 0) for word in words]
    assert 0.17 < np.mean(held_out) < 0.23
    assert held_out == [is_test_word(word, 0.2, 0) for word in words]
    assert held_out != [is_test_word(word, 0.2, 1) for word in words]
    larger = [is_test_word(word, 0.4, 0) for word in words]
    assert all(not small or large for small, large in zip(held_out, larger, strict=True))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "lower-case word"),
        (" The", "capitalised word"),
        ("A", "capitalised word"),
        (" USA", "upper-case word"),
        (" 42", "digits"),
        ("...", "punctuation"),
        ("\n", "white space"),
        ("", "white space"),
        ("a1", "other"),
        ("iPod", "other"),
        ("\N{EM DASH}", "other"),
    ],
)
def test_token_kinds(text: str, kind: str) -> None:
    assert token_kind(text) == kind


def test_document_starts_by_hand() -> None:
    docs = np.array([[7] * 4 + [8] * 20])
    keep = np.ones_like(docs, dtype=bool)
    keep[0, 5] = False
    known, starts = document_starts(docs, keep)
    # Document 7 was under way when the context began; of 8 the second token is special.
    assert known[0].nonzero()[0].tolist() == [4, *range(6, 24)]
    assert starts[0].nonzero()[0].tolist() == [4, *range(6, 20)]


def test_examples_are_capped_by_text_and_by_class_and_sides_share_no_text() -> None:
    label = ["a"] * 50 + ["b"] * 30
    key = [f"a{i % 5}" for i in range(50)] + [f"b{i % 15}" for i in range(30)]
    found = Found(np.arange(80), np.arange(80), label, key)
    chosen = choose(found, {"a": 0, "b": 1}, per_key=3, most=12, seed=0)
    kept = [key[row] for row in chosen.context.tolist()]
    assert max(kept.count(text) for text in set(kept)) <= 3
    assert torch.bincount(chosen.label).tolist() == [12, 12]
    assert chosen.context.tolist() == sorted(chosen.context.tolist())
    train, test = (keep_side(found, held_out=held_out, share=0.3, seed=0) for held_out in (False, True))
    assert not set(train.key) & set(test.key)
    assert len(train.key) + len(test.key) == 80
    assert 0 < len(test.key) < 40
    assert [key[row] for row in train.context] == train.key


def test_labels_files(tmp_path: Path) -> None:
    lines, table = tmp_path / "labels.jsonl", tmp_path / "labels.parquet"
    lines.write_text('{"doc_id": 3, "label": "sport"}\n\n{"doc_id": 4, "label": "law"}\n')
    assert read_labels(lines) == {3: "sport", 4: "law"}
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"doc_id": [3, 4], "label": [0, 1], "more": [1, 2]}), table)
    assert read_labels(table) == {3: "0", 4: "1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "line 1"),
        ('{"doc": 3}\n', "line 1"),
        ('{"doc_id": "3", "label": "x"}\n', "whole number"),
        ('{"doc_id": 3, "label": null}\n', "row 1"),
        ('{"doc_id": 3, "label": "x"}\n{"doc_id": 3, "label": "y"}\n', "second label"),
        ('{"doc_id": 3, "label": "x"}\n', "two to tell apart"),
    ],
)
def test_broken_labels_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_labels(path)


def test_other_broken_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no labels file"):
        read_labels(tmp_path / "none.jsonl")
    (tmp_path / "l.parquet").write_text(json.dumps({"doc_id": 1}))
    with pytest.raises(UserError, match="Parquet"):
        read_labels(tmp_path / "l.parquet")
    (tmp_path / "l.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_labels(tmp_path / "l.jsonl")
