"""Small shard sets and transcoders made by hand, and tiny language models with sets of their own activations.

All sizes differ from one another.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from handmade import Made
from lm_subject import Subject, make_subject
from planted_letters import Planted, make_planted

from matryoshka.shards import ShardSet


@pytest.fixture(scope="session")
def made() -> type[Made]:
    """Makers of shard sets, transcoders and runs."""
    return Made


@pytest.fixture(scope="session")
def val_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set with 13 val contexts in 3 shards, the last of which is not full."""
    return Made.shards(tmp_path_factory.mktemp("set") / "l1")


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """A function "gemma2" | "llama" | "gpt2" -> its subject, made once."""
    found: dict[str, Subject] = {}

    def get(kind: str) -> Subject:
        if kind not in found:
            folder = request.getfixturevalue(f"tiny_{kind}")
            found[kind] = make_subject(kind, folder, tmp_path_factory.mktemp(kind))
        return found[kind]

    return get


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Made once."""
    return make_planted(tmp_path_factory.mktemp("letters"))
