"""Whether a harvest goes on with the model it was begun with: its weights decide, never the spelling of a path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.weights_digest import weights_digest
from matryoshka.shards import Manifest

_SPELLING = ("model", "revision")


def same_spelling(saved: Manifest, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `wanted`, with the model named as `saved` names it where the weights are the same.

    Nothing is read where the names are equal already, or where a set of an earlier version knows no digest.
    """
    known = saved.model.get("weights_digest")
    spelled = {name: saved.settings.get(name) for name in _SPELLING}
    if known is None or spelled == {name: wanted.get(name) for name in _SPELLING}:
        return dict(wanted)
    same = weights_digest(str(wanted["model"]), wanted.get("revision")) == known
    return {**wanted, **spelled} if same else dict(wanted)


def check_weights(saved: Manifest, digest: str, folder: object, model: str) -> None:
    """Raise UserError when the set at `folder` was begun with weights of another digest than `model` has."""
    known = saved.model.get("weights_digest")
    if known is not None and known != digest:
        raise UserError(
            f"{folder} was harvested with other weights than those of {model} (digest {known[:8]}, now {digest[:8]}), "
            "which have changed since or are another model's. Give the model that it was begun with "
            f"({saved.model.get('model')}), or --out with a new folder; nothing was changed"
        )


def model_facts(saved: Manifest | None, lm: LanguageModel, layers: set[int], folder: object) -> dict[str, Any]:
    """What the manifest says of `lm`, checked against what it says already.

    Raises UserError when the set at `folder` was begun with other weights.
    """
    facts: dict[str, Any] = lm.describe() | {"weights_digest": lm.weights_digest}
    if more := {str(layer): note for layer in sorted(layers) if (note := lm.adds_more(layer)) is not None}:
        facts["adds_more"] = more
    if saved is None:
        return facts
    check_weights(saved, lm.weights_digest, folder, lm.name)
    had = saved.model
    if "weights_digest" not in had:  # made by an earlier version: as it says
        return {name: value for name, value in facts.items() if name in had}
    tokenizer = {**facts["tokenizer"], "name": had.get("tokenizer", {}).get("name")}
    return facts | {name: had.get(name) for name in _SPELLING} | {"tokenizer": tokenizer}
