"""Files of text that change while a set is being made: a fixed line goes on, another text is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from matryoshka.shards import ShardSet

Harvest = Callable[..., tuple[int, str]]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """1000 documents of 30 words in one file."""
    rng = np.random.default_rng(1)
    rows = [" ".join(f"w{word}" for word in rng.integers(0, 90, 30)) for _ in range(1000)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def shard_files(path: Path) -> dict[str, bytes]:
    """All but the manifest, which says how many bytes of text there were."""
    found = {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    del found["zarr.json"]
    return found


def test_a_fixed_line_goes_on(harvest: Harvest, lines: Path, tmp_path: Path) -> None:
    assert harvest("--dataset", str(lines), "--tokens", "28k", out=tmp_path / "whole")[0] == 0
    content = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join([*content[:800], content[800][:40] + "\n", *content[801:]]))
    assert harvest("--dataset", str(lines), "--tokens", "2k")[0] == 0
    code, said = harvest("--dataset", str(lines), "--tokens", "28k")
    assert code == 2
    assert "text.jsonl, line 801 is not JSON" in said
    n_committed = len(list((tmp_path / "out" / "manifest").glob("*.json")))
    assert n_committed > 3
    lines.write_text("".join(content))
    code, said = harvest("--dataset", str(lines), "--tokens", "28k")
    assert code == 0, said
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert shards.manifest.dataset["n_bytes"] == lines.stat().st_size
    whole = ShardSet.open(tmp_path / "whole")
    for split in ("train", "val"):
        found, wanted = (
            np.concatenate([one.split(split).tokens(i).numpy() for i in range(one.split(split).n_shards)])
            for one in (shards, whole)
        )
        assert np.array_equal(found, wanted)


def test_another_text_is_refused_before_anything_is_written(harvest: Harvest, lines: Path, tmp_path: Path) -> None:
    """Also where a missing shard comes before the first one that differs, and where the set was to grow."""
    assert harvest("--dataset", str(lines))[0] == 0
    content = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join([*content[:100], json.dumps({"text": "w1 w2"}) + "\n", *content[101:]]))
    out = tmp_path / "out"
    before = shard_files(out), (out / "zarr.json").read_bytes()
    code, said = harvest("--dataset", str(lines), "--tokens", "5k")
    assert code == 2
    assert "is not what it was when shard" in said
    assert (shard_files(out), (out / "zarr.json").read_bytes()) == before
    (out / "manifest" / "val-00000.json").unlink()
    assert harvest("--dataset", str(lines))[0] == 2
    assert not (out / "manifest" / "val-00000.json").exists()
    # text that is added behind is no other text
    lines.write_text("".join([*content, content[0]]))
    assert harvest("--dataset", str(lines))[0] == 0


def test_bad_lines_are_recorded(harvest: Harvest, lines: Path, tmp_path: Path) -> None:
    content = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join([*content[:20], "{oops\n", *content[20:90], "also\n", *content[90:]]))
    assert harvest("--dataset", str(lines))[0] == 2
    code, said = harvest("--dataset", str(lines), "--skip-bad-lines")
    assert code == 0, said
    assert f"2 broken lines were left out (2 of {lines})" in said
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest.skipped_lines == {str(lines): 2}
    assert "skip_bad_lines" not in manifest.settings
