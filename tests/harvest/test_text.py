"""Documents from files and from the hub, and what is said when there are none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest

from harvest.config import HarvestConfig
from harvest.text import BadLines, dataset_facts, documents
from harvest.text_files import local_files
from matryoshka.errors import UserError


def config(dataset: Path | str, **settings: Any) -> HarvestConfig:
    return HarvestConfig(layer=1, dataset=str(dataset), **settings)


def read(dataset: Path | str, **settings: Any) -> list[str]:
    return list(documents(config(dataset, **settings)))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_txt_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond caf\u00e9\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == ["first line\nsecond caf\u00e9\n"]


def test_jsonl_has_one_document_a_line(tmp_path: Path) -> None:
    rows = [
        {"text": "one"},
        {"text": ""},
        {"text": "two\nlines"},
        {"text": " \n"},
        {"text": None},
        {"text": "x", "n": 3},
    ]
    assert read(write_jsonl(tmp_path / "a.jsonl", rows)) == ["one", "two\nlines", "x"]
    other = write_jsonl(tmp_path / "b.jsonl", [{"body": "b", "text": 4}])
    assert read(other, text_column="body") == ["b"]


def test_parquet_has_one_document_a_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", None, "", "two"] * 200, n=[1, 2, 3, 4] * 200)
    assert read(path) == ["one", "two"] * 200


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("c.txt", "a.txt", "sub/b.txt", "notes.md", "sub/x.csv"):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b0"}, {"text": "b1"}])
    assert read(tmp_path) == ["a.txt", "b0", "b1", "c.txt", "sub/b.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "c.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "c.txt", "sub/b.txt"]
    (tmp_path / "odd[1].txt").write_text("brackets")
    assert read(tmp_path / "odd[1].txt") == ["brackets"]


def test_marks_and_half_pairs_of_real_text(tmp_path: Path) -> None:
    """A byte order mark is no text, and half a surrogate pair cannot be encoded by any tokenizer."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert read(tmp_path / "a.txt") == ["marked"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "broken \\ud83d, whole \\ud83d\\ude00"}\n')
    (text,) = read(tmp_path / "b.jsonl")
    assert text == "broken \ufffd, whole \U0001f600"
    text.encode()


def refused(dataset: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        read(dataset, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    assert "does not exist; give a file, a folder, a glob or a hub" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("missing.jsonl")
    assert "does not exist" in refused("./missing")
    (tmp_path / "README.md").write_text("x")
    assert "holds no .txt, .jsonl, .parquet file" in refused(tmp_path)
    assert "holds no .txt, .jsonl, .parquet file" in refused(tmp_path / "*.txt")
    assert "README.md is none of .txt, .jsonl, .parquet" in refused(tmp_path / "README.md")
    assert "README.md is none of" in refused(tmp_path / "*")


def test_wrong_columns(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"body": "x", "id": 3}])
    message = refused(jsonl)
    assert "a.jsonl, line 2: no text in column 'text', found ['body', 'id']; set harvest.text_column" in message
    assert "no text in column 'text'" in refused(write_jsonl(tmp_path / "b.jsonl", [{"text": 5}]))
    assert "found a list of 1 (str)" in refused(write_jsonl(tmp_path / "c.jsonl", [["text"]]))
    for value, what in (
        (["a", 3], "a list of 2 (int, str)"),
        (5, "a number (int)"),
        (1.5, "a number (float)"),
        (True, "a truth value"),
        ({"body": "x"}, "an object with ['body'], to be named as in meta.text"),
    ):
        message = refused(write_jsonl(tmp_path / "d.jsonl", [{"text": value}]))
        assert f"d.jsonl, line 1: no text in column 'text', it holds {what}; set harvest.text_column" in message
    assert "it holds bytes" in refused(write_parquet(tmp_path / "bytes.parquet", text=[b"x"]))
    assert "it holds a list of 1 (str)" in refused(write_parquet(tmp_path / "lists.parquet", text=[["x"]]))
    message = refused(write_parquet(tmp_path / "a.parquet", body=["x"], n=[1]))
    assert "has no column 'text', only ['body', 'n']; set harvest.text_column" in message
    assert "no text in column 'n'" in refused(tmp_path / "a.parquet", text_column="n")


def test_nested_columns_are_named_with_dots(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "one", "n": 1}}, {"meta": None}, {"meta": {"text": None}}, {"meta": {"text": "two"}}]
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", **_columns(rows))):
        assert read(path, text_column="meta.text") == ["one", "two"]
        assert "'meta.body'" in refused(path, text_column="meta.body")
        assert "it holds a number (int)" in refused(path, text_column="meta.n")
        assert "it holds an object with ['n', 'text']" in refused(path, text_column="meta")
    # a column of that whole name wins
    flat = [{"meta.text": "flat", "meta": {"text": "nested"}}]
    assert read(write_jsonl(tmp_path / "b.jsonl", flat), text_column="meta.text") == ["flat"]
    assert read(write_parquet(tmp_path / "b.parquet", **{"meta.text": ["flat"]}), text_column="meta.text") == ["flat"]


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "a.jsonl, line 2 is not JSON" in refused(tmp_path / "a.jsonl")
    for name, what in (
        ("latin.txt", "latin.txt cannot be read as UTF-8 text"),
        ("latin.jsonl", "latin.jsonl, line 1 is not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes('{"text": "caf\xe9 au lait"}'.encode("latin-1"))
        assert what in refused(tmp_path / name)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "deep.jsonl, line 1 is not JSON" in refused(tmp_path / "deep.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read as Parquet" in refused(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    assert "cannot be read as Parquet" in refused(tmp_path / "b.parquet")
    whole = write_parquet(tmp_path / "c.parquet", text=["word " * 50] * 400).read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:4] + b"\0" * 300 + whole[304:])
    assert "c.parquet cannot be read" in refused(tmp_path / "c.parquet")


def test_what_could_be_a_hub_name_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_files("monology/pile-uncopyrighted") is None
    (tmp_path / "monology" / "pile-uncopyrighted").mkdir(parents=True)
    (tmp_path / "monology" / "pile-uncopyrighted" / "a.txt").write_text("x")
    assert local_files("monology/pile-uncopyrighted") == [Path("monology/pile-uncopyrighted/a.txt")]


def test_hub_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": "one"}, {"text": None}, {"text": "two"})
        raise AssertionError("read further than asked for")

    def load(*args: Any, **settings: Any) -> Iterator[dict[str, Any]]:
        calls.append((args, settings))
        return rows()

    monkeypatch.setattr("datasets.load_dataset", load)
    settings = {"dataset_config": "sample", "dataset_split": "test", "dataset_revision": "abc"}
    found = documents(config("some/name", **settings))
    assert [next(found), next(found)] == ["one", "two"]
    assert calls == [(("some/name", "sample"), {"split": "test", "revision": "abc", "streaming": True})]
    # the commit that the manifest names wins: a branch moves on
    next(documents(config("some/name", **settings), {"commit": "c0ffee"}))
    assert calls[-1][1]["revision"] == "c0ffee"


@pytest.mark.parametrize("late", [False, True])
def test_unreachable_hub_says_what_was_tried(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"text": "one"}
        raise ConnectionError("Couldn't reach the Hub\nlots of detail")

    def load(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        if late:
            return broken()
        raise ConnectionError("Couldn't reach the Hub\nlots of detail")

    monkeypatch.setattr("datasets.load_dataset", load)
    message = refused("some/name")
    for part in ("'some/name'", "Hugging Face hub", "ConnectionError: Couldn't reach the Hub", "HF_TOKEN", "--dataset"):
        assert part in message


def test_wrong_hub_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([{"content": "x"}]))
    assert "dataset some/name: no text in column 'text', found ['content']" in refused("some/name")


def test_facts_show_a_changed_folder(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    facts = dataset_facts(config(tmp_path))
    assert facts == dataset_facts(config(tmp_path))
    assert (facts["n_files"], facts["n_bytes"]) == (2, 10)
    (tmp_path / "b.txt").rename(tmp_path / "0.txt")  # the same files and sizes in another order
    assert dataset_facts(config(tmp_path))["files_digest"] != facts["files_digest"]


class Hub:
    """Stands for the hub's client."""

    def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> Any:
        assert timeout < 60
        if name != "some/name":
            raise ConnectionError("offline")
        return SimpleNamespace(sha=f"commit of {revision}")


def test_a_hub_dataset_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    facts = dataset_facts(config("some/name", dataset_revision="main"))
    assert (facts["name"], facts["revision"], facts["split"]) == ("some/name", "main", "train")
    assert facts["commit"] == "commit of main"
    assert dataset_facts(config("other/name"))["commit"] is None
    # a set that was begun keeps to its commit, also when the hub cannot be asked; the first sets had none
    begun = {**facts, "commit": "older"}
    assert dataset_facts(config("some/name", dataset_revision="main"), begun)["commit"] == "older"
    assert "commit" not in dataset_facts(config("some/name"), {"name": "some/name"})


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    compress = gzip.compress if suffix == ".gz" else lambda data: bytes(pyarrow.compress(data, codec="zstd"))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("caf\u00e9\n".encode() * 3))
    rows = "".join(json.dumps({"text": f"row {i} " + "x" * 50}) + "\n" for i in range(5000)).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(rows))
    found = read(tmp_path)
    assert found[:-1] == [f"row {i} " + "x" * 50 for i in range(5000)]
    assert found[-1] == "caf\u00e9\n" * 3
    assert read(tmp_path / f"b.txt{suffix}") == found[-1:]
    assert "does not exist" in refused(f"missing.jsonl{suffix}")
    for broken in (b"not packed at all", compress(rows)[:-40]):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(broken)
        assert f"a.jsonl{suffix} cannot be read as UTF-8 text in {suffix}" in refused(tmp_path)
    (tmp_path / f"c.csv{suffix}").write_bytes(b"x")
    assert "is none of .txt, .jsonl, .parquet" in refused(tmp_path / f"c.csv{suffix}")


def test_repeated_documents_are_left_out_on_request(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "two ", "three", "two", "one"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert read(path) == texts
    assert read(path, dedup=True) == ["one", "two", "two ", "three"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_lines_are_left_out_on_request_and_counted_once(suffix: str, tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b'{"text": ', b'{"text": "caf\xe9"}', b"", b'{"text": "two"}', b"[" * 100_000]
    content = b"\n".join(lines)
    if suffix:
        content = gzip.compress(content) if suffix == ".gz" else bytes(pyarrow.compress(content, codec="zstd"))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    assert "line 2 is not JSON" in refused(path)
    assert "--skip-bad-lines" in refused(path)
    found = BadLines()
    for _ in range(2):
        assert list(documents(config(path, skip_bad_lines=True), None, found)) == ["one", "two"]
    assert found.counts() == {str(path): 3}
    # a line of another column is no broken line
    write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}])
    assert "no text in column" in refused(tmp_path / "b.jsonl", skip_bad_lines=True)
