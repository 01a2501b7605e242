"""Every table of the commands that need no language model, on terminals of 60 and 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matryoshka.shards import ShardSet

LONG = "l1-k9-lr0.003-group_sizes=6,11,31-second-seed"


@pytest.fixture
def folder(val_set: ShardSet, made: Any, tmp_path: Path) -> Path:
    """Two runs, one of a long name, and the set beside them under a short one."""
    made.run(tmp_path / "a", made.transcoder())
    made.run(tmp_path / LONG, made.transcoder(seed=5, input="normalized"))
    (tmp_path / "l1").symlink_to(val_set.path)
    return tmp_path


def test_tables_are_readable(folder: Path, check_readable: Callable[..., None]) -> None:
    shards = ["--shards", "l1"]
    commands = [
        ["run", "a", *shards],
        ["run", "a", LONG, *shards],
        ["compare", "a", LONG, f"{LONG}@2", *shards, "--l0", "15,12"],
        ["hierarchy", "a", *shards, "--no-clusters"],
        ["match", "a", LONG, *shards],
        ["layers", "a", LONG],
        ["samples", "a", *shards],
        ["show", "a", "3"],
    ]
    check_readable([["evaluate", *words] for words in commands], folder)
