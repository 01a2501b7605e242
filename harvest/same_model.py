"""Whether a harvest goes on with the model it was begun with: its weights and its config.json decide, never the
spelling of a path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.weights_digest import config_digest, differs, weights_digest
from matryoshka.shards import Manifest

_SPELLING = ("model", "revision")


def same_spelling(saved: Manifest, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `wanted`, with the model named as `saved` names it where it is the same.

    Nothing is read where the names are equal already, or where a set of an earlier version knows no digest.
    """
    spelled = {name: saved.settings.get(name) for name in _SPELLING}
    if not _knows_digest(saved) or spelled == {name: wanted.get(name) for name in _SPELLING}:
        return dict(wanted)
    found = _digests(str(wanted["model"]), wanted.get("revision"))
    return {**wanted, **spelled} if differs(saved.model, *found) is None else dict(wanted)


def check_model(saved: Manifest, folder: object, model: str, revision: str | None) -> None:
    """Raise UserError when the set at `folder` was begun with another model than `model` is now; loads nothing."""
    if _knows_digest(saved):
        _check(saved, _digests(model, revision), folder, model)


def check_finished(finished: Iterable[tuple[object, Manifest]], model: str) -> None:
    """Raise UserError when one of these sets (its folder, its manifest) was made with another model than `model`.

    Only a folder of this machine is looked at: nothing is downloaded to say that nothing is left to do.
    """
    known = [(folder, saved) for folder, saved in finished if _knows_digest(saved)]
    if known and Path(model).is_dir():
        found = _digests(model, None)
        for folder, saved in known:
            _check(saved, found, folder, model)


def model_facts(saved: Manifest | None, lm: LanguageModel, layers: set[int], folder: object) -> dict[str, Any]:
    """What the manifest says of `lm`, checked against what it says already.

    Raises UserError when the set at `folder` was begun with another model.
    """
    facts: dict[str, Any] = lm.describe() | {"weights_digest": lm.weights_digest, "config_digest": lm.config_digest}
    if more := {str(layer): note for layer in sorted(layers) if (note := lm.adds_more(layer)) is not None}:
        facts["adds_more"] = more
    if saved is None:
        return facts
    _check(saved, (lm.weights_digest, lm.config_digest), folder, lm.name)
    had = saved.model
    if not _knows_digest(saved):  # made by an earlier version: as it says
        return {name: value for name, value in facts.items() if name in had}
    if "config_digest" not in had:
        del facts["config_digest"]
    tokenizer = {**facts["tokenizer"], "name": had.get("tokenizer", {}).get("name")}
    return facts | {name: had.get(name) for name in _SPELLING} | {"tokenizer": tokenizer}


def _check(saved: Manifest, found: tuple[str, str], folder: object, model: str) -> None:
    if (what := differs(saved.model, *found)) is not None:
        raise UserError(
            f"{folder} was harvested with other {what} than those of {model}, "
            f"which has changed since or is another model. Give the model that it was begun with "
            f"({saved.model.get('model')}), or --out with a new folder; nothing was changed"
        )


def _knows_digest(saved: Manifest) -> bool:
    return "weights_digest" in saved.model


def _digests(model: str, revision: str | None) -> tuple[str, str]:
    return weights_digest(model, revision), config_digest(model, revision)
