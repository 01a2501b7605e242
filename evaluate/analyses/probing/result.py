"""probing.json: its schema."""

from __future__ import annotations

from typing import Literal

from matryoshka.config import Config

from ...result import Result


class ProbedClass(Config):
    """A class that took part."""

    label: str
    n_train: int
    """Examples, half of them of the class and half of the others."""
    n_test: int


class Score(Config):
    """Mean over the classes of a label set, on balanced test examples."""

    k: int | None
    """Latents or dimensions used; null is all"""
    accuracy: float
    f1: float


class ClassScore(Config):
    """One class at one k."""

    label: str
    latents: tuple[int, ...]
    """That differ most, first the one that differs most."""
    accuracy: float
    precision: float
    recall: float
    f1: float


class KScore(Score):
    """All classes of a label set at one k."""

    classes: tuple[ClassScore, ...]


class PrefixProbes(Config):
    """One nested prefix."""

    prefix_end: int
    scores: tuple[KScore, ...]


class LabelSet(Config):
    """One set of labels: how well the latents predict it, and how well the whole input does."""

    name: str
    unit: Literal["token", "document"]
    classes: tuple[ProbedClass, ...]
    left_out: tuple[str, ...]
    """Classes with fewer than settings.min_examples on either side."""
    majority_accuracy: float
    """Of always saying the commoner of two: examples are balanced, so a half."""
    source: Score
    """A probe on all dimensions of the encoder's input."""
    source_top_k: tuple[Score, ...]
    """On its k dimensions that differ most: what no dictionary gives."""
    prefixes: tuple[PrefixProbes, ...]


class ProbingResult(Result):
    """The content of probing.json."""

    FILE = "probing.json"

    tokenizer: str
    sets: tuple[LabelSet, ...]
    skipped: dict[str, str]
    """Label sets that could not be made, and why."""
