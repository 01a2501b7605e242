"""Numbers of val say what val is made of: whole documents, or blocks of documents that train has parts of too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from evaluate.analyses.compare.compare import compare
from evaluate.analyses.compare.table import comparison_table
from evaluate.analyses.reconstruction.result import Report
from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analyses.reconstruction.table import prefix_table, runs_table
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.result import ShardSetFacts
from evaluate.subject.held_out import rows_of
from matryoshka.shards import ShardSet


def of_documents(shards: ShardSet, path: Path) -> ShardSet:
    """The same set as if whole documents had been held out; `shards` is like those made before there was a choice."""
    shutil.copytree(shards.path, path)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["settings"]["val_unit"] = "document"
    (path / "zarr.json").write_text(json.dumps(root))
    return ShardSet.open(path)


def test_tables_and_files_say_what_was_held_out(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    runs = [made.run(tmp_path / name, made.transcoder(seed=seed)) for seed, name in enumerate("ab")]
    for shards, unit in ((val_set, "block"), (of_documents(val_set, tmp_path / "set"), "document")):
        assert shards.val_unit == unit
        config = EvaluateConfig(shards=Path(shards.path), device="cpu", batch_rows=64)
        answers = answer(RunAnalysis(), runs, config)
        reports = [one.result for one in answers]
        compared = compare([str(run) for run in runs], config)
        assert {one.shard_set.val_unit for one in reports} == {compared.val_unit} == {unit}
        assert json.loads(answers[0].path.read_text())["shard_set"]["val_unit"] == unit
        for table in (prefix_table(reports[0]), runs_table(reports), comparison_table(compared)):
            assert "held-out rows" in str(table.title)
            assert ("held-out blocks" in str(table.title)) == (unit == "block")


def test_results_of_before_there_was_a_choice_are_of_blocks(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    config = EvaluateConfig(shards=Path(val_set.path), device="cpu", batch_rows=64)
    (first,) = answer(RunAnalysis(), [run], config)
    content = json.loads(first.path.read_text())
    del content["shard_set"]["val_unit"]
    assert "held-out blocks" in str(prefix_table(Report.model_validate(content)).title)
    # and they still answer the question
    first.path.write_text(json.dumps(content))
    (again,) = answer(RunAnalysis(), [run], config)
    assert not again.is_new


def test_train_rows_are_of_no_held_out_unit(val_set: ShardSet) -> None:
    assert ShardSetFacts.of(val_set, "train").rows == rows_of("train", "document") == "TRAIN rows (seen in training)"
