"""The folder of pages without a browser: its data, its bytes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analyses.samples.files import read_windows
from evaluate.analyses.samples.samples import SamplesAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.report.build import make_report
from evaluate.report.data_file import write_data
from evaluate.report.directions import nearest_directions
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet


def read(folder: Path, name: str) -> Any:
    text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
    match = re.fullmatch(r'give\("([^"]+)",(.*)\);\n', text)
    assert match is not None
    assert match[1] == name
    return json.loads(match[2])


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_data_is_what_was_measured(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    pages = make_report(run, EvaluateConfig(shards=val_set.path, device="cpu"))
    assert "token ids are shown" in pages.notes[0]
    folder = pages.index.parent
    overview, latents = read(folder, "overview"), read(folder, "latents")
    report = json.loads((folder.parent / "report.json").read_text())
    assert overview["report"]["threshold"] == report["threshold"]
    assert overview["prefix_ends"] == [6, 17, 48]
    assert overview["metrics"]["step"] == []
    used = dict(overview["used"])
    assert used["tokens seen"] == "4,400"  # 400 steps of 11 rows
    assert used["precision of the encoder product"] == used["dataset"] == "not recorded"
    assert {name: len(column) for name, column in latents.items()} == dict.fromkeys(
        ("density", "max", "mean", "cosine", "words"), 48
    )
    chunks = [read(folder, f"chunk-{i}") for i in range(2)]
    assert [len(chunk["latents"]) for chunk in chunks] == [32, 16]
    assert overview["search"] == {"n_fires_files": 1, "n_text_files": 1, "share_parts": 10_000}
    assert read(folder, "fires-0")["keys"][:2] == ["[10]", "[11]"]
    assert all("[" in text for text, _ in read(folder, "text-0"))
    for latent in (0, 31, 32, 47):
        chunk, found = chunks[latent // 32], read_windows(folder.parent / "samples", latent)
        written = [dict(zip(chunk["fields"], w, strict=True)) for w in chunk["latents"][latent % 32]["windows"]]
        assert len(written) == len(found) > 20
        for page, window in zip(written, found, strict=True):
            assert (page["kind"], page["decile"], page["rank"]) == (window.kind, window.decile, window.rank)
            assert [chunk["texts"][token] for token in page["tokens"]] == [f"[{token}]" for token in window.tokens]
            acts = dict(zip(page["acts"][::2], page["acts"][1::2], strict=True))
            assert [acts.get(i, 0.0) for i in range(len(window.acts))] == pytest.approx(window.acts, rel=1e-6)


def test_same_bytes_again(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    config = EvaluateConfig(shards=val_set.path, device="cpu")
    folder = make_report(run, config).index.parent
    first = hashes(folder)
    (folder / "data" / "chunk-77.js").write_text("left over from a wider run")
    assert make_report(run, EvaluateConfig(device="cpu")).index.parent == folder
    assert hashes(folder) == first
    assert not folder.with_name("report.partial").exists()


def test_metrics_of_a_run_that_was_killed_while_it_wrote(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    lines = [json.dumps({"step": step, "fvu/prefix_6": 0.5, "dead_share": 0.25}) for step in range(2500)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2500, "fv']))
    metrics = read(make_report(run, EvaluateConfig(shards=val_set.path, device="cpu")).index.parent, "overview")[
        "metrics"
    ]
    assert metrics["step"] == list(range(0, 2500, 3))
    assert set(metrics["dead_share"]) == {0.25}
    assert [set(values) for values in metrics["fvu"]] == [{0.5}, {None}, {None}]


def test_the_shard_set_is_needed_where_something_is_missing(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run, config = made.run(tmp_path / "run", made.transcoder()), EvaluateConfig(shards=val_set.path, device="cpu")
    with pytest.raises(UserError, match="no shard set was named"):
        make_report(run, EvaluateConfig(device="cpu"))
    answer(SamplesAnalysis(), [run], config)
    with pytest.raises(UserError, match="no shard set was named"):
        make_report(run, EvaluateConfig(device="cpu"))
    answer(RunAnalysis(), [run], config)
    index = make_report(run, EvaluateConfig(device="cpu")).index
    # A run that says what it was trained on needs nothing else.
    other = made.run(tmp_path / "other" / "run", made.transcoder(), shards=val_set)
    pages = make_report(other, EvaluateConfig(device="cpu")).index.parent
    assert (pages / "data" / "latents.js").read_bytes() == (index.parent / "data" / "latents.js").read_bytes()
    # It was trained on since: its numbers are made anew, though older ones are there.
    made.run(other, made.transcoder(seed=5), steps=(500,), shards=val_set)
    assert '"step":500' in make_report(other, EvaluateConfig(device="cpu")).index.with_name(
        "pages.json"
    ).read_text().replace(" ", "")


def test_a_folder_of_its_own(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    with pytest.raises(UserError, match="no shard set was named"):
        make_report(run, EvaluateConfig(device="cpu", out=tmp_path / "out"))
    pages = make_report(run, EvaluateConfig(shards=val_set.path, device="cpu", out=tmp_path / "out"))
    assert pages.index == tmp_path / "out" / "report" / "index.html"
    assert not (run / "eval").exists()


def test_a_data_file_is_ascii_json_in_a_call(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = {"a": "</script>\u2028\u00e9\U0001f600", "b": [None, 1.5]}
    write_data(tmp_path / "data", "x", content)
    assert read(tmp_path, "x") == content
    with pytest.raises(ValueError, match="Out of range"):
        write_data(tmp_path / "data", "y", float("nan"))


def test_nearest_directions_against_all_cosines() -> None:
    W_dec = torch.randn(21, 5, generator=torch.Generator().manual_seed(0))
    found = nearest_directions(W_dec, 4)
    for latent in range(21):
        cosines = {
            other: float(torch.nn.functional.cosine_similarity(W_dec[latent], W_dec[other], dim=0))
            for other in range(21)
            if other != latent
        }
        wanted = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert [other for other, _ in found[latent]] == wanted
        assert [cosine for _, cosine in found[latent]] == pytest.approx([cosines[other] for other in wanted], abs=6e-4)
    assert nearest_directions(W_dec[:1]) == [[]]
