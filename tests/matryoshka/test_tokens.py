"""The text of single tokens, for the three ways in which tokenizers write bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from matryoshka.errors import UserError
from matryoshka.tokens import TokenTexts

TEXT = " caf\u00e9 \u4f60\u597d\n\tend"


def byte_level(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_bytes_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = byte_level(tmp_path / "a" / "tok")
    texts = TokenTexts.read(str(folder))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert b"".join(texts.raw(i) for i in ids).decode() == TEXT
    assert texts.text(256) == "<|end|>"
    assert texts.raw(9999) == b"[9999]"
    cut = next(i for i in ids if texts.raw(i)[0] >= 0x80)
    assert texts.text(cut) == "\ufffd"
    assert [texts.raw(i) for i in range(256)] != sorted(texts.raw(i) for i in range(256))
    assert {texts.raw(i) for i in range(256)} == {bytes([b]) for b in range(256)}


def test_pieces_with_a_metaspace_and_byte_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"\u2581hello": 0, "<0xE4>": 1, "<0x0A>": 2, "<0xG0>": 3}
    Tokenizer(models.WordLevel(words, unk_token="<0xG0>")).save(str(tmp_path / "tokenizer.json"))
    texts = TokenTexts.read(str(tmp_path))
    assert [texts.raw(i) for i in range(4)] == [b" hello", b"\xe4", b"\n", b"<0xG0>"]


def test_a_relative_folder_is_found_from_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level(tmp_path / "data" / "model")
    (tmp_path / "data" / "runs" / "r").mkdir(parents=True)
    monkeypatch.chdir("/")
    assert TokenTexts.read("data/model", near=tmp_path / "data" / "runs" / "r").text(256) == "<|end|>"


def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such-model", "/no/such/folder", "../x y"):
        with pytest.raises(UserError, match="cannot be had"):
            TokenTexts.read(name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        TokenTexts.read(str(tmp_path))
