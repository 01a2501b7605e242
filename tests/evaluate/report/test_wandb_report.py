"""The pages of a report in Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluate.config import EvaluateConfig
from evaluate.report.build import make_report
from evaluate.report.wandb_report import log_pages
from matryoshka.shards import ShardSet


def test_pages_become_an_artifact_with_the_numbers_beside_it(
    val_set: ShardSet, made: Any, tmp_path: Path, wandb_records: Callable[[Path], list[Any]]
) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    config = EvaluateConfig(shards=val_set.path, device="cpu", wandb="offline")
    pages = make_report(run, config).index.parent
    log_pages(pages, config)
    (file,) = pages.parent.glob("wandb/offline-run-*/*.wandb")
    found = wandb_records(file)
    (artifact,) = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    assert (artifact.type, artifact.name) == ("report", "run-report")
    logged = {entry.path for entry in artifact.manifest.contents}
    assert logged == {path.relative_to(pages).as_posix() for path in pages.rglob("*") if path.is_file()}
    summary = {
        (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    report = json.loads((pages.parent / "report.json").read_text())
    for prefix in report["threshold"]:
        assert summary[f"fvu/prefix_{prefix['prefix_end']}"] == pytest.approx(prefix["fvu"])
        assert summary[f"l0/prefix_{prefix['prefix_end']}"] == pytest.approx(prefix["l0"])


def test_off_writes_nothing(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    config = EvaluateConfig(shards=val_set.path, device="cpu")
    pages = make_report(run, config).index.parent
    log_pages(pages, config)
    assert not (pages.parent / "wandb").exists()
