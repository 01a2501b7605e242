"""Shared vocabulary of the pipeline and its public Python API.

>>> from matryoshka import ShardSet, Transcoder
>>> shards = ShardSet.open("data/l17")          # doctest: +SKIP
>>> transcoder = Transcoder.load("data/runs/l17-k96/checkpoints/step-003662")          # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka.errors import UserError
    from matryoshka.lm import LanguageModel
    from matryoshka.norms import Norm
    from matryoshka.shards import ShardSet
    from matryoshka.sites import HookPair, Site
    from matryoshka.transcoder import Transcoder, TranscoderConfig

_HOMES = {
    "HookPair": "matryoshka.sites",
    "LanguageModel": "matryoshka.lm",
    "Norm": "matryoshka.norms",
    "ShardSet": "matryoshka.shards",
    "Site": "matryoshka.sites",
    "Transcoder": "matryoshka.transcoder",
    "TranscoderConfig": "matryoshka.transcoder",
    "UserError": "matryoshka.errors",
}

__all__ = [
    "HookPair",
    "LanguageModel",
    "Norm",
    "ShardSet",
    "Site",
    "Transcoder",
    "TranscoderConfig",
    "UserError",
]


def __getattr__(name: str) -> Any:
    # On demand, because `harvest --help` comes through this package and importing torch takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
