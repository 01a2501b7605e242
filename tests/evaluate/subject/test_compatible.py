"""A transcoder of another model, site or width is refused, and the message names both sides."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from evaluate.subject.compatible import check_compatible
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet


@pytest.mark.parametrize(
    ("changes", "own", "theirs"),
    [
        ({"d_in": 13}, "13", "12"),
        ({"d_out": 11}, "11", "10"),
        ({"source_hook": "blocks.2.hook_resid_mid"}, "blocks.2.hook_resid_mid", "blocks.1.hook_resid_mid"),
        ({"target_hook": ""}, "target site ''", "blocks.1.hook_mlp_out"),
        ({"model": "gpt2"}, "gpt2", "google/gemma-2-2b"),
        ({"model_revision": "def"}, "def", "abc"),
    ],
)
def test_differences_are_refused(val_set: ShardSet, made: Any, changes: dict[str, Any], own: str, theirs: str) -> None:
    with pytest.raises(UserError) as error:
        check_compatible(made.transcoder(**changes), val_set, "l1-k9")
    for text in (own, theirs, "l1-k9", str(val_set.path)):
        assert text in str(error.value)


def test_an_unknown_revision_is_no_difference(val_set: ShardSet, made: Any) -> None:
    check_compatible(made.transcoder(model_revision=None), val_set, "l1-k9")


def test_weights_decide_where_both_sides_know_them(val_set: ShardSet, made: Any) -> None:
    """`../m/llama` and `/abs/m/llama` may be one model; A/model and B/model may be two."""
    model = val_set.manifest.model | {"model": "/abs/m/llama", "weights_digest": "aa11"}
    manifest = val_set.manifest.model_copy(update={"model": model})
    known = copy.copy(val_set)
    known.manifest = manifest
    check_compatible(made.transcoder(model="../m/llama", model_revision=None, model_digest="aa11"), known, "l1-k9")
    with pytest.raises(UserError, match="weights of the language model 'bb22' against 'aa11'"):
        check_compatible(
            made.transcoder(model="/other/llama", model_revision=None, model_digest="bb22"), known, "l1-k9"
        )
    # one that knows no digest is judged by its name, as before there were any
    check_compatible(made.transcoder(model="/other/llama", model_revision=None), known, "l1-k9")


def test_nan_weights_are_refused(val_set: ShardSet, made: Any) -> None:
    transcoder = made.transcoder()
    transcoder.b_dec[3] = float("nan")
    with pytest.raises(UserError, match="NaN in b_dec"):
        check_compatible(transcoder, val_set, "l1-k9")
