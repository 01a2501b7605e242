"""The search in saved windows against a loop over every token of every window, and its files against the search."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluate.analyses.samples.files import all_windows
from evaluate.analyses.samples.samples import SamplesAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.report.search_files import bucket, write_search
from evaluate.report.window_search import CONTEXTS, FIRES, MAX_QUERY, PARTS, WindowIndex, words_of
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet

# Two ids of one word, letters beyond the basic plane, one that lower case makes longer, a key that is none, spaces.
TEXTS = [f" tok{i}" for i in range(40)]
TEXTS[5:14] = [" Dog", "dog", "\u0130", "\U0001f600", "__proto__", "   ", "e\u0301", " \u05e9\u05dc\u05d5\u05dd", "a b"]
QUERIES = [
    "dog",
    " DOG ",
    "dog tok20",
    "tok20 dog DOG",
    "i\u0307",
    "\u0130",
    "\U0001f600",
    "__proto__",
    "constructor",
    "\u2423",
    "\u00e9",
    "\u05e9\u05dc\u05d5\u05dd",
    "a b",
    "tok",
    "tok2",
    "k20 t",
    "\U0001f600 t",
    "",
    "  ",
    "\u00a0dog\u2003",
    "no such",
]


@pytest.fixture(scope="module")
def samples(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 6 tokens at most, many of which overlap."""
    folder = tmp_path_factory.mktemp("searched")
    shards = made.shards(folder / "l1", val_contexts=(7, 4), ctx_len=16)
    run = made.run(folder / "run", made.transcoder())
    config = {"shards": shards.path, "device": "cpu", "samples": {"before": 3, "after": 2, "top": 5}}
    return answer(SamplesAnalysis(), [run], EvaluateConfig.model_validate(config))[0].path.parent


@pytest.fixture(scope="module")
def index(samples: Path) -> WindowIndex:
    return WindowIndex.read(samples, TEXTS.__getitem__)


def firing(samples: Path) -> dict[int, list[tuple[str, float]]]:
    """Latent -> (token as it is looked for, activation) of each row that one of its windows holds."""
    rows: dict[int, dict[tuple[int, int], tuple[str, float]]] = defaultdict(dict)
    for windows in all_windows(samples):
        for window in windows:
            for i, (token, act) in enumerate(zip(window.tokens, window.acts, strict=True)):
                if act > 0:
                    word = TEXTS[token].strip().lower().replace("e\u0301", "\u00e9") or "\u2423"
                    rows[window.latent][window.context, window.position - window.peak + i] = (word, act)
    return {latent: list(own.values()) for latent, own in rows.items()}


@pytest.mark.parametrize("query", QUERIES)
def test_who_fires_on_a_word(index: WindowIndex, samples: Path, query: str) -> None:
    words = set(query.lower().replace("e\u0301", "\u00e9").split())
    wanted = {}
    for latent, rows in firing(samples).items():
        hit = sum(act for word, act in rows if word in words)
        if hit > 0:
            wanted[latent] = hit / sum(act for _, act in rows)
    found = index.find(query)
    assert found.shares is not None
    assert set(found.latents) == set(wanted)
    # Each word of a query is rounded by itself, and no share to nothing.
    shares = dict(zip(found.latents, found.shares, strict=True))
    assert {i: share / PARTS for i, share in shares.items()} == pytest.approx(wanted, abs=len(words) / PARTS)
    assert found.latents == sorted(shares, key=lambda latent: (-shares[latent], latent))


@pytest.mark.parametrize("query", QUERIES)
def test_who_has_words_in_a_window(index: WindowIndex, samples: Path, query: str) -> None:
    wanted = query.strip().lower().replace("e\u0301", "\u00e9")
    latents = {
        window.latent
        for windows in all_windows(samples)
        for window in windows
        if window.kind != "random" and wanted and wanted in "".join(map(lower, window.tokens))
    }
    assert index.find(query, CONTEXTS).latents == sorted(latents)


def lower(token: int) -> str:
    return TEXTS[token].lower().replace("e\u0301", "\u00e9")


def test_the_questions_find_something(index: WindowIndex) -> None:
    assert [query for query in QUERIES if not index.find(query).latents] == [
        "constructor",
        "a b",
        "tok",
        "tok2",
        "k20 t",
        "",
        "  ",
        "no such",
    ]
    assert [query for query in QUERIES if not index.find(query, CONTEXTS).latents] == [
        "dog tok20",
        "tok20 dog DOG",
        "constructor",
        "\u2423",
        "",
        "  ",
        "no such",
    ]


def test_the_text_of_overlapping_windows_is_kept_once(index: WindowIndex, samples: Path) -> None:
    rows = set()
    for windows in all_windows(samples):
        for window in windows:
            if window.kind != "random":
                first = window.position - window.peak
                rows |= {(window.context, first + i, token) for i, token in enumerate(window.tokens)}
    assert sum(map(len, index.contexts.texts)) == sum(len(lower(token)) for *_, token in rows)


def test_the_files_hold_what_the_search_knows(
    index: WindowIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.report.search_files.ENTRIES_PER_FILE", 100)
    monkeypatch.setattr("evaluate.report.search_files.TEXT_FILE_SIZE", 700)
    facts = write_search(tmp_path, index)
    assert facts["share_parts"] == PARTS
    assert facts["n_fires_files"] > 3
    assert facts["n_text_files"] > 2
    assert len(list(tmp_path.iterdir())) == facts["n_fires_files"] + facts["n_text_files"]
    seen = []
    for number in range(facts["n_fires_files"]):
        file = read(tmp_path, f"fires-{number}")
        for key, latents, shares in zip(file["keys"], file["latents"], file["shares"], strict=True):
            assert bucket(key, facts["n_fires_files"]) == number
            if words_of(key) == [key]:
                found = index.find(key)
                assert (latents, shares) == (found.latents, found.shares)
            seen.append(key)
    assert sorted(seen) == sorted(index.firing.keys)
    # Of each window its text, cut out as JavaScript does: by units of UTF-16.
    wanted = []
    contexts = index.contexts
    for i, text in enumerate(contexts.texts):
        for w in range(contexts.starts[i], contexts.starts[i + 1]):
            wanted.append((int(contexts.latents[w]), text[contexts.first[w] : contexts.end[w]]))
    written = []
    for number in range(facts["n_text_files"]):
        for text, windows in read(tmp_path, f"text-{number}"):
            units, first = text.encode("utf-16-le"), 0
            for latent, step, length in zip(windows[::3], windows[1::3], windows[2::3], strict=True):
                first += step
                written.append((latent, units[2 * first : 2 * (first + length)].decode("utf-16-le")))
    assert written == wanted
    assert len(written) > 300


def read(folder: Path, name: str) -> Any:
    text = (folder / f"{name}.js").read_text(encoding="ascii")
    match = re.fullmatch(r'give\("([^"]+)",(.*)\);\n', text)
    assert match is not None
    assert match[1] == name
    return json.loads(match[2])


def test_bucket_is_fnv_1a() -> None:
    # Published values of the 32-bit hash over single bytes; a unit below 256 counts as one here.
    assert [bucket(text, 2**32) for text in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]
    assert bucket("\U0001f600", 7) == bucket("\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), 7)


def test_what_cannot_be_asked(index: WindowIndex) -> None:
    with pytest.raises(UserError, match="200 characters at most"):
        index.find("w" * (MAX_QUERY + 1))
    with pytest.raises(UserError, match="in 'fires' or in 'contexts', not in 'nowhere'"):
        index.find("w", "nowhere")


def test_no_windows_and_a_torn_file(tmp_path: Path) -> None:
    kinds = {"latent": pa.int32(), "kind": pa.string(), "context": pa.int32(), "position": pa.int32()}
    kinds |= {"peak": pa.int16(), "tokens": pa.list_(pa.int32()), "acts": pa.list_(pa.float32())}
    pq.write_table(pa.table({name: pa.array([], kind) for name, kind in kinds.items()}), tmp_path / "samples.parquet")
    index = WindowIndex.read(tmp_path, str)
    assert [index.find("a", where).latents for where in (FIRES, CONTEXTS)] == [[], []]
    (tmp_path / "pages").mkdir()
    assert write_search(tmp_path / "pages", index) == {"n_fires_files": 1, "n_text_files": 0, "share_parts": PARTS}
    (tmp_path / "samples.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="run evaluate samples again"):
        WindowIndex.read(tmp_path, str)


def test_one_latent(made: Any, tmp_path: Path, val_set: ShardSet) -> None:
    run = made.run(tmp_path / "run", made.transcoder(group_sizes=(1,), k=1))
    config = EvaluateConfig(shards=val_set.path, device="cpu")
    samples = answer(SamplesAnalysis(), [run], config)[0].path.parent
    index = WindowIndex.read(samples, TEXTS.__getitem__)
    words = {word for _, rows in firing(samples).items() for word, _ in rows}
    shares = [index.find(word).shares for word in words if " " not in word]
    assert all(share and len(share) == 1 for share in shares)
