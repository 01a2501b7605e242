"""One table from the reports of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.report.layers import compare_layers
from evaluate.report.layers_table import layers_table
from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet


@pytest.fixture
def runs(val_set: ShardSet, made: Any, tmp_path: Path) -> list[Path]:
    """Two runs that were evaluated; the first says afterwards that it is of layer 9."""
    found = []
    for seed, (name, layer) in enumerate((("late", 9), ("early", 1))):
        run = made.run(tmp_path / name, made.transcoder(seed=seed))
        (evaluation,) = answer(RunAnalysis(), [run], EvaluateConfig(shards=val_set.path, device="cpu", bootstrap=20))
        content = json.loads(evaluation.path.read_text())
        content["transcoder"]["config"]["source_hook"] = f"blocks.{layer}.hook_resid_mid"
        publish_json(evaluation.path, content)
        found.append(run)
    return found


def test_the_numbers_are_those_of_the_reports(runs: list[Path], val_set: ShardSet, tmp_path: Path) -> None:
    layers = compare_layers(runs, tmp_path / "out")
    assert [(entry.run, entry.layer) for entry in layers.entries] == [("early", 1), ("late", 9)]
    for entry in layers.entries:
        folder = tmp_path / entry.run / "eval" / f"l1-{val_set.digest[:8]}"
        report = json.loads((folder / "report.json").read_text())
        assert [prefix.fvu for prefix in entry.prefixes] == [prefix["fvu"] for prefix in report["threshold"]]
        assert [prefix.l0 for prefix in entry.prefixes] == [prefix["l0"] for prefix in report["threshold"]]
        assert [list(prefix.fvu_interval or ()) for prefix in entry.prefixes] == report["spread"]["fvu_interval"]
        assert entry.prefixes[-1].dead_share == report["total"]["dead_share"]
        assert entry.prefixes[0].dead_share == report["groups"][0]["dead_share"]
        assert entry.prefixes[1].dead_share == pytest.approx(
            sum(group["n_dead"] for group in report["groups"][:2]) / (6 + 11)
        )
        assert {prefix.ce_recovered for prefix in entry.prefixes} == {None}
        assert (entry.n_rows, entry.k) == (report["n_rows"], 9)
    assert json.loads((tmp_path / "out" / "layers.json").read_text()) == layers.model_dump(mode="json")
    assert layers_table(layers).row_count == 6


def test_cross_entropy_recovered_where_it_was_measured(runs: list[Path], made: Any) -> None:
    (folder,) = (runs[0] / "eval").iterdir()
    report = json.loads((folder / "report.json").read_text())
    facts = {name: report[name] for name in ("transcoder", "shard_set", "settings")}
    content = made.results(facts)["faithfulness"].model_dump(mode="json")
    shares = {17: 0.5, 48: None}
    prefixes = [
        {**prefix, "ce_recovered_zero": shares[prefix["prefix_end"]]}
        for prefix in content["prefixes"]
        if prefix["prefix_end"] in shares
    ]
    publish_json(folder / "faithfulness.json", {**content, "prefixes": prefixes})
    late = compare_layers(runs).entries[1]
    assert [prefix.ce_recovered for prefix in late.prefixes] == [None, 0.5, None]
    publish_json(folder / "faithfulness.json", {**content, "transcoder": {**report["transcoder"], "sha256": "other"}})
    assert {prefix.ce_recovered for prefix in compare_layers(runs).entries[1].prefixes} == {None}


def test_runs_without_a_current_report_are_said(runs: list[Path], made: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no report yet; make one with: evaluate run"):
        compare_layers([*runs, made.run(tmp_path / "new", made.transcoder())])
    made.run(runs[0], made.transcoder(seed=7), steps=(900,))
    with pytest.raises(UserError, match="no report of its newest checkpoint"):
        compare_layers(runs)
    with pytest.raises(UserError, match="no run was named"):
        compare_layers([])
