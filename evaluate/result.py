"""What the result of an analysis is of, where it goes, and how it is read and published.

    RUN/eval/<shard set>-<digest8>/           what was measured on val rows, of all nested groups
    RUN/eval/<shard set>-<digest8>/train/     on train rows; prefix-2/ of the first two groups alone

The same weights, rows and settings give the same bytes: no times, no library versions, no paths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationError

from matryoshka.checkpoints import Checkpoint
from matryoshka.config import Config
from matryoshka.locations import portable_name
from matryoshka.runs import fsync_path, publish_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .config import EvaluateConfig
from .subject.held_out import ValUnit, rows_of


class TranscoderFacts(Config):
    """Which weights were evaluated."""

    run: str
    step: int | None
    sha256: str
    """of the safetensors file"""
    config: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, transcoder: Transcoder) -> Self:
        """Those of `checkpoint`, of which `transcoder` is all or a prefix."""
        config = transcoder.config.model_dump(mode="json")
        config["model"] = portable_name(transcoder.config.model)
        return cls(run=checkpoint.name, step=checkpoint.step, sha256=checkpoint.sha256, config=config)


class ShardSetFacts(Config):
    """On what."""

    name: str
    digest: str
    model: str
    model_revision: str | None
    source_hook: str
    target_hook: str
    split: Literal["val", "train"] = "val"
    """train rows, which the transcoder has seen, are used only when they are asked for"""
    val_unit: ValUnit = "block"
    """what val is made of: whole documents, or blocks of documents that train has parts of too, as in results that
    do not say it"""

    @classmethod
    def of(cls, shards: ShardSet, split: Literal["val", "train"] = "val") -> Self:
        """The rows of one split of `shards`."""
        manifest = shards.manifest
        return cls(
            name=shards.name,
            digest=shards.digest,
            model=portable_name(str(manifest.model.get("model", ""))),
            model_revision=manifest.model.get("revision"),
            source_hook=manifest.source.hook_point,
            target_hook=manifest.target.hook_point,
            split=split,
            val_unit=shards.val_unit,
        )

    @property
    def rows(self) -> str:
        """What a table calls them."""
        return rows_of(self.split, self.val_unit)


class Result(Config):
    """What an analysis found: a JSON file, which is written last, and the tables beside it."""

    FILE: ClassVar[str]
    """In the folder of an evaluation."""
    TABLES: ClassVar[tuple[str, ...]] = ()
    """In the same folder as FILE."""

    format_version: Literal[1] = 1
    transcoder: TranscoderFacts
    shard_set: ShardSetFacts
    settings: dict[str, Any]
    """All that decides the numbers, beside the weights and the rows."""

    def identity(self) -> dict[str, Any]:
        """What decides every number here."""
        return identity_of(self.transcoder, self.shard_set, self.settings)

    def tables(self) -> tuple[str, ...]:
        """The tables that belong to this one."""
        return self.TABLES

    @classmethod
    def read(cls, folder: Path, file: str | None = None) -> Self | None:
        """The result in `folder`; None when there is none that this version can read, or a table of it is gone (it is
        then made anew)."""
        path = folder / (file or cls.FILE)
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            return None
        return found if all((path.parent / table).is_file() for table in found.tables()) else None

    def publish(self, path: Path, made: Path) -> None:
        """Move the tables in `made` to the folder of `path`; then write this result to `path`."""
        path.unlink(missing_ok=True)
        for table in self.TABLES:
            if table in self.tables():
                os.replace(made / table, path.parent / table)
            else:
                (path.parent / table).unlink(missing_ok=True)
        fsync_path(path.parent)
        publish_json(path, self.model_dump(mode="json"))


def default_folder(checkpoint: Checkpoint, shards: ShardSet) -> Path:
    """RUN/eval/<shard set>-<first 8 of its digest>."""
    return checkpoint.run / "eval" / f"{shards.name}-{shards.digest[:8]}"


def result_folder(checkpoint: Checkpoint, shards: ShardSet, config: EvaluateConfig) -> Path:
    """Where results of `config` go: its `out`, else `default_folder`.

    What was measured on train rows, or of a nested prefix alone, has a folder of its own below that one, so that nobody
    takes it for the numbers of the run.
    """
    if config.out is not None:
        return config.out
    folder = default_folder(checkpoint, shards)
    if config.split == "train":
        folder /= "train"
    return folder if config.prefix is None else folder / f"prefix-{config.prefix}"


def identity_of(transcoder: TranscoderFacts, shard_set: ShardSetFacts, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, rows and settings: the same for the same numbers."""
    return {
        "transcoder": {"step": transcoder.step, "sha256": transcoder.sha256},
        "shard_set": {"digest": shard_set.digest},
        "settings": settings,
    }


def finite(value: float) -> float | None:
    """JSON has no NaN: a number that is not defined becomes null."""
    return value if math.isfinite(value) else None
