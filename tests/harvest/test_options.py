"""Options of the text and of the batches, through the command, as they end up in the set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSet
from matryoshka.shards.verify import verify

Harvest = Callable[..., tuple[int, str]]


@pytest.fixture
def made(harvest: Harvest, tmp_path: Path) -> Callable[..., ShardSet]:
    """A function: options -> the set."""

    def run(*options: str) -> ShardSet:
        code, said = harvest("--tokens", "1k", *options)
        assert code == 0, said
        assert verify(tmp_path / "out").is_whole
        return ShardSet.open(tmp_path / "out")

    return run


def test_unpacked_contexts_are_filled_up_with_a_special_token(made: Callable[..., ShardSet], lm: LanguageModel) -> None:
    shards = made("--no-pack", "--max-doc-tokens", "20")
    n_filled = 0
    for shard in range(shards.train.n_shards):
        tokens, doc_ids, keep = shards.train.tokens(shard), shards.train.doc_ids(shard), shards.train.keep(shard).T
        assert bool((doc_ids == doc_ids[:, :1]).all())
        for context, kept in zip(tokens, keep, strict=True):
            n = int(kept.sum())
            n_filled += n < 15
            assert bool(kept[1 : 1 + n].all())
            assert context[1 + n :].eq(lm.tokenizer.pad_token_id).all()
    assert n_filled > 3
    # 20 tokens are two contexts, the second with 5 of them
    assert {int(n) for n in shards.train.keep(0).sum(0)} <= {15, 5, *range(5, 15)}
    assert shards.manifest.settings["pack"] is False


def test_padding_changes_no_activation_before_it(made: Callable[..., ShardSet], lm: LanguageModel) -> None:
    shards = made("--no-pack", "--max-doc-tokens", "20")
    name = shards.manifest.source.hook_point
    tokens, keep, source = shards.val.tokens(0), shards.val.keep(0), shards.val.activations("source", 0)
    short = [c for c in range(len(tokens)) if int(keep[:, c].sum()) < 15]
    assert short
    for context in short:
        n = 1 + int(keep[:, context].sum())
        alone = lm.capture(tokens[context : context + 1, :n].long(), [name])[name][0].bfloat16()
        torch.testing.assert_close(source[:n, context], alone, rtol=0.02, atol=0.02)


def test_without_bos_every_position_is_text(made: Callable[..., ShardSet]) -> None:
    shards = made("--bos", "none")
    assert shards.manifest.bos_id is None
    assert bool(shards.train.keep(0).all())
    assert not bool((shards.train.tokens(0) == 2).any())


def test_another_bos_is_special_too(made: Callable[..., ShardSet]) -> None:
    shards = made("--bos", "5")
    assert (shards.manifest.bos_id, shards.manifest.special_ids) == (5, (0, 1, 2, 3, 5))
    assert bool((shards.train.tokens(0)[:, 0] == 5).all())
    assert not bool(shards.train.keep(0)[0].any())


def test_a_bos_that_is_no_token_is_refused(harvest: Harvest) -> None:
    code, said = harvest("--bos", "97")
    assert code == 2
    assert "bos = 97 is no token of" in said
    assert harvest("--bos", "first")[0] == 2


def test_repeated_text_is_harvested_once(harvest: Harvest, tmp_path: Path, tiny_text: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number, file in enumerate(sorted(tiny_text.glob("*.txt"))[:20]):
        for copy in "ab":
            (text / f"{number:02d}{copy}.txt").write_text(file.read_text())
    n_tokens = {}
    for option in ("--dedup", "--no-dedup"):
        code, said = harvest("--dataset", str(text), "--tokens", "600k", option, out=tmp_path / option)
        assert code == 0, said
        shards = ShardSet.open(tmp_path / option)
        n_tokens[option] = shards.train.n_contexts + shards.val.n_contexts
    assert abs(2 * n_tokens["--dedup"] - n_tokens["--no-dedup"]) <= 3


def test_the_batch_size_may_be_left_to_the_harvest(made: Callable[..., ShardSet]) -> None:
    assert made("--batch-size", "auto").train.n_contexts > 0


def test_documents_are_counted_in_a_shard_and_in_a_split(made: Callable[..., ShardSet]) -> None:
    shards = made()
    for record in shards.records:
        found = shards.split(record.split).doc_ids(record.shard)
        assert record.n_documents == len(set(found.flatten().tolist()))
    for split in (shards.train, shards.val):
        ids = [number for shard in range(split.n_shards) for number in split.doc_ids(shard).flatten().tolist()]
        assert split.n_documents == len(set(ids))
    of_shards = sum(record.n_documents or 0 for record in shards.records if record.split == "train")
    assert of_shards > shards.train.n_documents  # documents that cross shards
