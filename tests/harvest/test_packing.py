"""Contexts against a slow twin: no token lost, every token with its document, splits by hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from harvest import packing as module
from harvest.packing import BLOCK_CONTEXTS, SPLIT_ORDER, Packing, ShardJob, assign_split, cut_text, split_jobs
from matryoshka.shards import SplitPlan, plan_splits

BOS = 1
CTX = 8


def tokenize(texts: list[str]) -> list[list[int]]:
    """One token a word; ids are the numbers in the words."""
    return [[int(word[1:]) for word in text.split()] for text in texts]


def make_texts(lengths: list[int]) -> list[str]:
    """Documents of distinct words, so that every token can be found again."""
    texts, start = [], 10
    for length in lengths:
        texts.append(" ".join(f"w{i}" for i in range(start, start + length)))
        start += length
    return texts


LENGTHS = [3, 700, 0, 12, 255, 1, 1, 90, 33, 2, 400, 7, 18, 600, 5, 64, 128, 250] * 2


def pack(
    bos: int | None = BOS, seed: int = 0, val_fraction: float = 0.3, unit: Literal["document", "block"] = "document"
) -> Packing:
    return Packing(ctx_len=CTX, bos_id=bos, val_fraction=val_fraction, seed=seed, val_unit=unit)


def plans(n_contexts: int, val_fraction: float = 0.3) -> dict[str, SplitPlan]:
    return plan_splits(n_contexts, val_fraction, CTX, 4)


def jobs(texts: list[str], n_contexts: int, packing: Packing) -> list[ShardJob]:
    plan = plans(n_contexts, packing.val_fraction)
    return [job for split in SPLIT_ORDER for job in split_jobs(split, texts, tokenize, packing, plan[split])]


def slow_streams(texts: list[str], packing: Packing) -> dict[str, list[tuple[int, int]]]:
    """split -> (token, document) in order, one token at a time."""
    text_len = packing.ctx_len - (1 if packing.bos_id is not None else 0)
    streams: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
    for number, text in enumerate(texts):
        document = hashlib.blake2b(text.encode(), digest_size=16).digest()
        for place, token in enumerate(tokenize([text])[0]):
            block = place // (BLOCK_CONTEXTS * text_len) if packing.val_unit == "block" else 0
            split = assign_split(document, block, packing)
            streams[split].append((token, number))
    return streams


def stream_of(found: list[ShardJob], split: str, packing: Packing) -> list[tuple[int, int]]:
    first = 0 if packing.bos_id is None else 1
    return [
        (int(token), int(doc_id))
        for job in found
        if job.split == split
        for context, ids in zip(job.tokens, job.doc_ids, strict=True)
        for token, doc_id in zip(context[first:], ids[first:], strict=True)
    ]


@pytest.mark.parametrize("unit", ["document", "block"])
@pytest.mark.parametrize("bos", [BOS, None])
def test_no_token_is_lost_between_contexts(bos: int | None, unit: Literal["document", "block"]) -> None:
    texts, packing = make_texts(LENGTHS), pack(bos, unit=unit)
    found = jobs(texts, 100_000, packing)  # more is planned than there is: all the text must come out
    wanted = slow_streams(texts, packing)
    text_len = CTX if bos is None else CTX - 1
    for split in ("train", "val"):
        whole = len(wanted[split]) // text_len * text_len
        assert whole > 20 * text_len
        assert stream_of(found, split, packing) == wanted[split][:whole]
        assert len(wanted[split]) - whole < text_len


def test_a_document_is_in_one_split() -> None:
    texts = make_texts(LENGTHS)
    found = jobs(texts, 100_000, pack())
    documents = {
        split: {int(doc) for job in found if job.split == split for doc in job.doc_ids.unique()}
        for split in SPLIT_ORDER
    }
    assert min(map(len, documents.values())) > 3
    assert not documents["train"] & documents["val"]
    # and with blocks, on request, the long ones are in both
    found = jobs(texts, 100_000, pack(unit="block"))
    documents = {
        split: {int(doc) for job in found if job.split == split for doc in job.doc_ids.unique()}
        for split in SPLIT_ORDER
    }
    assert documents["train"] & documents["val"]


def test_val_comes_first() -> None:
    order = [job.split for job in jobs(make_texts(LENGTHS), 100, pack())]
    assert order == sorted(order, reverse=True)
    assert set(order) == {"val", "train"}


def test_each_context_starts_with_bos_of_the_document_that_follows() -> None:
    for job in jobs(make_texts(LENGTHS), 100_000, pack()):
        assert job.tokens.dtype == job.doc_ids.dtype == torch.int32
        assert job.tokens.shape == job.doc_ids.shape
        assert bool((job.tokens[:, 0] == BOS).all())
        assert not bool((job.tokens[:, 1:] == BOS).any())
        assert torch.equal(job.doc_ids[:, 0], job.doc_ids[:, 1])


def test_shards_follow_the_plan() -> None:
    texts, packing = make_texts(LENGTHS), pack()
    plan = plans(100)
    found = jobs(texts, 100, packing)
    sizes = {name: tuple(len(job.tokens) for job in found if job.split == name) for name in plan}
    assert sizes == {name: plan[name].shard_contexts for name in plan}
    for name in plan:
        assert [job.shard for job in found if job.split == name] == list(range(plan[name].n_shards))


def test_text_is_not_read_further_than_needed() -> None:
    n_read = 0

    def counted() -> Iterator[str]:
        nonlocal n_read
        for text in make_texts([50] * 5000):
            n_read += 1
            yield text

    for split, plan in plans(100).items():
        assert len(list(split_jobs(split, counted(), tokenize, pack(), plan))) == plan.n_shards
    assert n_read < 500


def test_text_that_ends_early_fills_a_last_smaller_shard() -> None:
    texts, packing = make_texts([1000]), pack(val_fraction=1e-9)
    found = jobs(texts, 400, packing)  # 50 contexts a shard
    assert [(job.split, len(job.tokens)) for job in found] == [("train", 49), ("train", 49), ("train", 44)]
    assert sum(len(job.tokens) for job in found) == 1000 // (CTX - 1)


def test_more_planned_contexts_do_not_change_the_order() -> None:
    texts, packing = make_texts(LENGTHS), pack()
    few, many = jobs(texts, 60, packing), jobs(texts, 300, packing)
    for split in ("train", "val"):
        short, long = stream_of(few, split, packing), stream_of(many, split, packing)
        assert short == long[: len(short)]
        assert len(long) > 2 * len(short)


def test_the_same_shards_however_text_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, packing = make_texts(LENGTHS), pack()
    wanted = jobs(texts, 80, packing)
    for batch in (1, 7, 1000):
        monkeypatch.setattr(module, "_TOKENIZE_DOCUMENTS", batch)
        found = jobs(texts, 80, packing)
        assert [(job.split, job.shard) for job in found] == [(job.split, job.shard) for job in wanted]
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.doc_ids, b.doc_ids)


def test_split_depends_on_the_document_alone() -> None:
    """Not on its place: documents in another order fall into the same splits, so evaluation text stays unseen."""
    packing = pack()
    texts = make_texts([30] * 200)

    def splits(order: list[str]) -> dict[str, str]:
        found = {}
        for split, stream in slow_streams(order, packing).items():
            found |= {order[number]: split for _, number in stream}
        return found

    assert splits(texts) == splits(texts[::-1])
    tokens: dict[str, Tensor] = {}
    for split in ("train", "val"):
        pieces = [job.tokens[:, 1:].flatten() for job in jobs(texts[::-1], 100_000, packing) if job.split == split]
        tokens[split] = torch.cat(pieces)
    for text, split in splits(texts).items():
        other = tokens["val" if split == "train" else "train"]
        assert not bool(torch.isin(other, torch.tensor(tokenize([text])[0], dtype=torch.int32)).any())


def test_long_documents_are_split_in_blocks_of_sixteen_contexts() -> None:
    packing = pack(val_fraction=0.5, unit="block")
    (text,) = make_texts([CTX * 16 * 40])
    streams = slow_streams([text], packing)
    block = 16 * (CTX - 1)
    for stream in streams.values():
        starts = [token for place, (token, _) in enumerate(stream) if place == 0 or stream[place - 1][0] != token - 1]
        assert len(starts) > 3
        assert all((start - 10) % block == 0 for start in starts)
    found = jobs([text], 100_000, packing)
    assert {job.split for job in found} == {"train", "val"}


def test_share_and_seed_of_the_split() -> None:
    documents = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(4000)]
    for fraction in (0.05, 0.5):
        drawn = [assign_split(document, 0, pack(val_fraction=fraction)) for document in documents]
        assert abs(drawn.count("val") / 4000 - fraction) < 0.03
    first, second = (["".join(assign_split(d, 0, pack(seed=seed))[0] for d in documents)] for seed in (0, 1))
    assert first != second
    # fixed for ever: evaluations of later versions must hold out the same text
    assert [assign_split(document, 0, pack()) for document in documents[:6]] == [
        "val",
        "train",
        "train",
        "train",
        "train",
        "val",
    ]


def test_unpacked_contexts_are_of_one_document() -> None:
    texts = make_texts(LENGTHS)
    packing = Packing(ctx_len=CTX, bos_id=BOS, val_fraction=0.3, seed=0, pad_id=0)
    found = jobs(texts, 100_000, packing)
    wanted: dict[str, list[list[int]]] = {"train": [], "val": []}
    for text in texts:
        document = hashlib.blake2b(text.encode(), digest_size=16).digest()
        ids = tokenize([text])[0]
        for start in range(0, len(ids), CTX - 1):
            context = [BOS, *ids[start : start + CTX - 1]]
            split = assign_split(document, 0, packing)
            wanted[split].append(context + [0] * (CTX - len(context)))
    for split, contexts in wanted.items():
        assert [c.tolist() for job in found if job.split == split for c in job.tokens] == contexts
        assert all(bool((job.doc_ids == job.doc_ids[:, :1]).all()) for job in found)


def test_long_documents_are_cut_on_request() -> None:
    texts = make_texts(LENGTHS)
    packing = Packing(ctx_len=CTX, bos_id=BOS, val_fraction=0.3, seed=0, max_doc_tokens=20)
    short = [" ".join(text.split()[:20]) for text in texts]
    # The split goes by the hash of the whole text, so it is not that of the short one.
    tokens = {t for job in jobs(texts, 100_000, packing) for t in job.tokens.flatten().tolist()} - {BOS}
    kept = {t for text in short for t in tokenize([text])[0]}
    assert tokens <= kept
    assert len(kept) - len(tokens) < 2 * (CTX - 1)


@pytest.mark.parametrize("size", [1, 40, 1000])
def test_long_texts_are_tokenised_in_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, and never more text at once than allowed, however long a line is."""
    texts = make_texts(LENGTHS)
    wanted = jobs(texts, 100_000, pack())
    sizes: list[int] = []

    def measured(batch: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, batch)))
        return tokenize(batch)

    if size > 1:  # no word of these fits into one character
        monkeypatch.setattr(module, "_TOKENIZE_CHARACTERS", size)
    plan = plans(100_000)
    found = [job for split in SPLIT_ORDER for job in split_jobs(split, texts, measured, pack(), plan[split])]
    assert max(sizes) <= module._TOKENIZE_CHARACTERS
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.doc_ids, b.doc_ids)


def test_no_more_of_a_long_text_is_tokenised_than_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOKENIZE_CHARACTERS", 60)
    n_seen = 0

    def counted(batch: list[str]) -> list[list[int]]:
        nonlocal n_seen
        found = tokenize(batch)
        n_seen += sum(map(len, found))
        return found

    packing = Packing(ctx_len=CTX, bos_id=BOS, val_fraction=1e-9, seed=0, max_doc_tokens=20)
    found = list(split_jobs("train", make_texts([5000]), counted, packing, plans(100, 1e-9)["train"]))
    assert sum(len(job.tokens) for job in found) == 20 // (CTX - 1)
    assert n_seen < 40


def test_texts_are_cut_before_single_spaces() -> None:
    text = "one two  three\nfour" + "x" * 30 + " end"
    parts = list(cut_text(text, 12))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 12 for part in parts)
    assert parts[0] == "one"  # the two spaces before three belong together
    assert parts[-1].endswith(" end")
    # without any white space there is no better way
    assert list(cut_text("y" * 25, 10)) == ["y" * 10, "y" * 10, "y" * 5]
    assert list(cut_text("short", 12)) == ["short"]
    assert not any(re.search(r"\s$", part) for part in cut_text("word " * 50 + "end", 33))
