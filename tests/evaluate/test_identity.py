"""When a published result answers the question that is asked now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluate.checkpoint import find_checkpoint
from evaluate.result import ShardSetFacts, TranscoderFacts, already_answered, identity_of
from matryoshka.shards import ShardSet


class Result:
    def __init__(self, identity: dict[str, Any]) -> None:
        self._identity = identity

    def identity(self) -> dict[str, Any]:
        return self._identity


def test_a_result_knows_itself_by_the_facts_it_holds(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder()
    checkpoint = find_checkpoint(made.run(tmp_path / "run", transcoder))
    asked = identity_of(checkpoint, val_set, {"seed": 0})
    facts = TranscoderFacts.of(checkpoint, transcoder), ShardSetFacts.of(val_set)
    assert identity_of(*facts, {"seed": 0}) == asked
    assert asked["transcoder"] == {"step": 400, "sha256": checkpoint.sha256}
    assert asked["shard_set"] == {"digest": val_set.digest}


def test_only_the_same_identity_answers() -> None:
    asked = {"shard_set": {"digest": "a"}, "settings": {"seed": 0}}
    result, other = Result(dict(asked)), Result({**asked, "settings": {"seed": 1, "top": 5}})
    assert already_answered(None, asked) == (None, ())
    assert already_answered(result, asked) == (result, ())
    assert already_answered(other, asked) == (None, ("settings.seed: 1 -> 0", "settings.top: 5 -> null"))
