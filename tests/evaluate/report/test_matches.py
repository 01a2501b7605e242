"""What pages take from results of `evaluate match`, against the tables that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from evaluate.analyses.match.match import match
from evaluate.config import EvaluateConfig
from evaluate.report.matches import Matches
from evaluate.report.parts import compared_digests
from evaluate.subject.subjects import Subject
from matryoshka.shards import ShardSet


@pytest.fixture
def runs(val_set: ShardSet, made: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs, the second one narrower."""
    one, other = made.transcoder(), made.transcoder(seed=5, group_sizes=(4, 9), k=3)
    return (
        made.run(tmp_path / "runs" / "one", one, shards=val_set),
        made.run(tmp_path / "runs" / "other", other, shards=val_set),
    )


def test_matches_of_either_side_and_of_prefixes(runs: tuple[Path, Path], made: Any, val_set: ShardSet) -> None:
    one, other = runs
    evaluation, transcoder = one / "eval" / "l1-12345678", made.transcoder()
    digests = compared_digests(transcoder)
    assert Subject("", transcoder).digest() in digests
    asked = {evaluation / "matched": (one, other), one.parent / "as-other": (other, f"{one}@2")}
    for out, (first, second) in asked.items():
        match(str(first), str(second), EvaluateConfig(shards=val_set.path, device="cpu", out=out))
    # of weights that are not these
    match(str(other), f"{other}@1", EvaluateConfig(shards=val_set.path, device="cpu", out=one / "not-mine"))
    found = Matches.near(one, evaluation, lambda: digests, 48)
    assert [facts["name"] for facts in found.facts()] == ["other", "other"]
    assert found.unread == ()
    seen = 0
    for number, (out, side) in enumerate([(evaluation / "matched", 0), (one.parent / "as-other", 1)]):
        rows = [row for row in pq.read_table(out / "matches.parquet").to_pylist() if row["side"] == side]
        assert len(rows) == (17 if side else 48)
        for row in rows:
            own = [entry for entry in found.of(row["latent"]) if entry[0] == number]
            values = [row[name] for name in ("like", "correlation", "nearest", "cosine")]
            if all(value is None for value in values):
                assert own == []
                continue
            seen += 1
            assert own[0][1::2] == values[::2]
            assert own[0][2::2] == [
                value if value is None else pytest.approx(value, rel=1e-3) for value in values[1::2]
            ]
    assert seen > 50
    # A latent beyond the prefix that was matched has the one match alone.
    assert {entry[0] for entry in found.of(30)} <= {0}


@pytest.mark.parametrize("broken", ["json", "parquet", "no parquet", "other latents"])
def test_broken_matches_are_named(broken: str, runs: tuple[Path, Path], made: Any, val_set: ShardSet) -> None:
    one, other = runs
    out = one / "matched"
    match(str(one), str(other), EvaluateConfig(shards=val_set.path, device="cpu", out=out))
    if broken == "json":
        (out / "matching.json").write_text("{")
    elif broken == "parquet":
        (out / "matches.parquet").write_bytes(b"PAR1")
    elif broken == "no parquet":
        (out / "matches.parquet").unlink()
    digests = compared_digests(made.transcoder())
    found = Matches.near(one, one / "eval" / "l1", lambda: digests, 20 if broken == "other latents" else 48)
    assert found.facts() == []
    assert found.unread == (out.resolve(),)
    assert found.of(3) == []
