"""What decides the numbers of a result, and whether a published one already answers the question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from matryoshka.runs import changed_fields
from matryoshka.shards import ShardSet

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    # Which imports this file: its report has an identity too.
    from .report_file import ShardSetFacts, TranscoderFacts


class _Result(Protocol):
    def identity(self) -> dict[str, Any]: ...


ResultT = TypeVar("ResultT", bound=_Result)


def identity_of(
    transcoder: Checkpoint | TranscoderFacts, shard_set: ShardSet | ShardSetFacts, settings: dict[str, Any]
) -> dict[str, Any]:
    """Weights, rows and settings, as they are or as a result tells of them: the same for the same numbers."""
    return {
        "transcoder": {"step": transcoder.step, "sha256": transcoder.sha256},
        "shard_set": {"digest": shard_set.digest},
        "settings": settings,
    }


def already_answered(existing: ResultT | None, identity: Mapping[str, Any]) -> tuple[ResultT | None, tuple[str, ...]]:
    """`existing` where it has this identity, else None; and how it differs, one "key: old -> new" each."""
    changes = () if existing is None else tuple(changed_fields(existing.identity(), identity))
    return None if changes else existing, changes
