"""The text of single tokens, for the three ways in which tokenizers write bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def as_of_opt(folder: Path) -> Path:
    """The files of facebook/opt: GPT-2's vocab.json and merges.txt, and no tokenizer.json."""
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", *alphabet, "en", "\u0120c"]
    folder.mkdir(parents=True)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    models.BPE(vocabulary, [("e", "n"), ("\u0120", "c")]).save(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return folder


def test_older_files_are_read_through_transformers(tmp_path: Path) -> None:
    folder = as_of_opt(tmp_path / "opt")
    texts = TokenTexts.read(str(folder))
    ids = json.loads((folder / "vocab.json").read_text())
    assert texts.text(ids["en"]) == "en"
    assert texts.text(ids["\u0120c"]) == " c"
    assert texts.text(ids["</s>"]) == "</s>"
    assert {texts.raw(i) for i in range(3, 259)} == {bytes([b]) for b in range(256)}
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "merges.txt",
        "tokenizer_config.json",
        "vocab.json",
    ]


@pytest.mark.process
def test_older_files_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Without a network, of a repository that was downloaded before."""
    as_of_opt(tmp_path / "hub" / "models--some--opt" / "snapshots" / "abc")
    (tmp_path / "hub" / "models--some--opt" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--opt" / "refs" / "main").write_text("abc")
    code = "from matryoshka.tokens import TokenTexts; print(repr(TokenTexts.read('some/opt').text(260)))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "' c'\n", done.stderr


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    content = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has no tokenizer\.json and cannot be converted"):
        TokenTexts.read(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_relative_folder_is_found_from_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level(tmp_path / "data" / "model")
    (tmp_path / "data" / "runs" / "r").mkdir(parents=True)
    monkeypatch.chdir("/")
    assert TokenTexts.read("data/model", near=tmp_path / "data" / "runs" / "r").text(256) == "<|end|>"


def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such-model", "/no/such/folder", "../x y"):
        with pytest.raises(UserError, match="is not available"):
            TokenTexts.read(name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        TokenTexts.read(str(tmp_path))
