"""absorption.json and probing.json for the first page: every score, and single letters and classes of the whole only.

All prefixes of all classes would make the first page several times as large.
"""

from __future__ import annotations

from typing import Any

MOST_LATENTS = 5
_IDENTITY = ("format_version", "transcoder", "shard_set", "settings")


def absorption_facts(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The scores of each prefix; the letters of the last one."""
    if record is None:
        return None
    last = len(record["prefixes"]) - 1
    prefixes = [prefix if i == last else {**prefix, "letters": []} for i, prefix in enumerate(record["prefixes"])]
    return {**_content(record), "prefixes": prefixes}


def probing_facts(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The scores of each label set, prefix and k; of the last prefix the classes too, for small k."""
    if record is None:
        return None
    return {**_content(record), "sets": [_label_set(labels) for labels in record["sets"]]}


def _label_set(labels: dict[str, Any]) -> dict[str, Any]:
    last = len(labels["prefixes"]) - 1
    prefixes = [
        {**prefix, "scores": [_score(score, with_classes=i == last) for score in prefix["scores"]]}
        for i, prefix in enumerate(labels["prefixes"])
    ]
    return {**labels, "prefixes": prefixes}


def _score(score: dict[str, Any], *, with_classes: bool) -> dict[str, Any]:
    k = score["k"]
    kept = score["classes"] if with_classes and k is not None and k <= MOST_LATENTS else []
    return {**score, "classes": kept}


def _content(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _IDENTITY}
