"""absorption.json: its schema."""

from __future__ import annotations

from matryoshka.config import Config

from ...result import Result

Interval = tuple[float, float]


class LetterProbe(Config):
    """How well a letter can be read from the encoder's own input, at all prefixes the same."""

    letter: str
    n_train_words: int
    n_test_words: int
    """no word is in both"""
    n_test_rows: int
    """of that letter"""
    f1: float | None
    """of the probe on the test rows of all letters; null with too few words to fit one"""
    precision: float | None
    recall: float | None
    passed: bool
    """F1 above settings.min_probe_f1"""


class Absorber(Config):
    """A latent that fires instead of the main latents."""

    latent: int
    n_rows: int
    words: tuple[str, ...]
    """on which; at most 5"""


class LetterAbsorption(Config):
    """One letter whose probe passed, at one prefix."""

    letter: str
    n_true_positives: int
    """Test rows of the letter on which the probe is right: the denominator of all shares."""
    main_latents: tuple[int, ...]
    """Best first; more than one where the F1 jumped (feature splitting)."""
    k_sparse_f1: tuple[float, ...]
    """Test F1 of the probe on the best k latents alone, k = 1, 2, ..., up to the first that did not pay."""
    absorption_fraction: float
    full_absorption: float
    missed: float
    """Share on which no main latent fires: the most that full absorption could be."""
    absorbers: tuple[Absorber, ...]
    """Of full absorption, most rows first; at most 5."""


class PrefixAbsorption(Config):
    """One nested prefix: means over its letters, intervals over draws of test words."""

    prefix_end: int
    n_letters: int
    """That passed and that some latent predicts."""
    letters_without_latent: tuple[str, ...]
    """Passed, but no latent of the prefix has a positive weight for them; in no mean."""
    absorption_fraction: float | None
    absorption_fraction_interval: Interval | None
    full_absorption: float | None
    full_absorption_interval: Interval | None
    missed: float | None
    missed_interval: Interval | None
    n_main_latents: float | None
    """Mean number of main latents of a letter: 1 is no splitting."""
    main_f1: float | None
    """Mean F1 of the main latents; where it is low they are hardly latents of their letters."""
    letters: tuple[LetterAbsorption, ...]


class AbsorptionResult(Result):
    """The content of absorption.json."""

    FILE = "absorption.json"

    tokenizer: str
    n_train_rows: int
    """Rows of train words, from the train split."""
    n_test_rows: int
    """Rows of test words, from shard_set.split."""
    probes: tuple[LetterProbe, ...]
    prefixes: tuple[PrefixAbsorption, ...]
