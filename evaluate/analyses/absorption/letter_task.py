"""The first-letter task of one shard set: which rows, their inputs, and the probes, made once for all transcoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.tokens import TokenTexts
from matryoshka.transcoder import Transcoder

from ...analysis import Progress
from ...config import AbsorptionConfig, EvaluateConfig
from ...measures.probe import LinearProbe, fit_probe, quality
from ...resume import Parts
from ...rows.gather import gather_source
from ...rows.words import LETTERS, WordPositions, find_words, is_test_word, only
from .result import LetterProbe


@dataclass(frozen=True)
class LetterProbes:
    """The probes at one input convention."""

    facts: tuple[LetterProbe, ...]
    probes: dict[str, LinearProbe]
    """Of the letters that passed."""
    right: dict[str, np.ndarray]
    """bool [test rows]: the row begins with the letter and its probe predicts it."""


@dataclass(frozen=True)
class LetterTask:
    """Rows and probes of `shards`; nothing is read before it is needed."""

    shards: ShardSet
    config: EvaluateConfig
    texts: TokenTexts
    progress: Progress
    _made: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """(input convention, letter) -> `_probe`, for the next transcoder that reads the same"""

    @property
    def settings(self) -> AbsorptionConfig:
        """Settings of the task alone."""
        return self.config.absorption

    @cached_property
    def train(self) -> WordPositions:
        """Rows of train words, from the train split."""
        return self._positions("train", self.settings.train_tokens, held_out=False)

    @cached_property
    def test(self) -> WordPositions:
        """Rows of test words, from the split that is evaluated."""
        return self._positions(self.config.split, self.config.tokens, held_out=True)

    @cached_property
    def train_source(self) -> Tensor:
        """[train rows, d_in] bfloat16"""
        return self.gather("train", self.train.context, self.train.position, "train words")

    @cached_property
    def test_source(self) -> Tensor:
        """[test rows, d_in] bfloat16"""
        return self.gather(self.config.split, self.test.context, self.test.position, "test words")

    def gather(self, split: str, contexts: Tensor, positions: Tensor, name: str) -> Tensor:
        """Sources of rows, [rows, d_in] bfloat16."""
        self.progress.started(name, len(contexts))
        return gather_source(self.shards.split(split), contexts, positions, self.shards.d_in, self.progress.advanced)

    def inputs(self, source: Tensor, transcoder: Transcoder) -> Tensor:
        """`source` in the convention of the transcoder's input, float32."""
        convention = transcoder.config.input
        return apply_convention(source, convention, source_site=self.shards.manifest.source.site, norm=self.shards.norm)

    def probes(self, transcoder: Transcoder, parts: Parts) -> LetterProbes:
        """The probes on what `transcoder` reads; those in `parts` are not fitted again.

        Raises UserError when too few letters can be read from it.
        """
        facts: list[LetterProbe] = []
        probes: dict[str, LinearProbe] = {}
        right: dict[str, np.ndarray] = {}
        truth = self.test.letters().numpy()
        x_test = self.inputs(self.test_source, transcoder).numpy()
        x_train = cache(lambda: self.inputs(self.train_source, transcoder).numpy())
        self.progress.started("probes", len(LETTERS) * len(self.train))
        for number, letter in enumerate(LETTERS):
            found = parts.made(
                f"probe {letter}", partial(self._probe, transcoder.config.input, number, x_train, x_test)
            )
            facts.append(LetterProbe.model_validate(found["facts"]))
            if facts[-1].passed:
                probes[letter] = LinearProbe(np.array(found["weight"]), found["bias"])
                right[letter] = (probes[letter].score(x_test) > 0) & (truth == number)
            self.progress.advanced(len(self.train))
        self._refuse_too_few(facts)
        return LetterProbes(facts=tuple(facts), probes=probes, right=right)

    def _positions(self, split: str, limit: int | None, *, held_out: bool) -> WordPositions:
        settings, seed = self.settings, self.config.seed
        found = find_words(
            self.shards,
            self.shards.split(split),
            self.texts,
            limit=limit,
            max_words=settings.max_words,
            per_word=settings.per_word,
            seed=seed,
        )
        is_test = torch.tensor([is_test_word(word, settings.test_share, seed) for word in found.words] or [False])
        return only(found, is_test[found.word] == held_out)

    def _probe(
        self, convention: str, number: int, x_train: Callable[[], np.ndarray], x_test: np.ndarray
    ) -> dict[str, Any]:
        """The probe of one letter, as JSON: `facts` of a LetterProbe, and where it passed its `weight` and `bias`."""
        letter = LETTERS[number]
        if (convention, letter) in self._made:
            return self._made[convention, letter]
        y_train, y_test = self.train.letters().numpy() == number, self.test.letters().numpy() == number
        n_words = tuple(len(np.unique(p.word.numpy()[y])) for p, y in ((self.train, y_train), (self.test, y_test)))
        made: dict[str, Any] = {}
        found = None
        if min(n_words) >= self.settings.min_words:
            probe = fit_probe(x_train(), y_train, c=self.settings.probe_c, balanced=True)
            found = quality(y_test, probe.score(x_test) > 0)
            if found.f1 > self.settings.min_probe_f1:
                made = {"weight": probe.weight.tolist(), "bias": probe.bias}
        facts = LetterProbe(
            letter=letter,
            n_train_words=n_words[0],
            n_test_words=n_words[1],
            n_test_rows=int(y_test.sum()),
            f1=None if found is None else found.f1,
            precision=None if found is None else found.precision,
            recall=None if found is None else found.recall,
            passed=bool(made),
        )
        self._made[convention, letter] = {**made, "facts": facts.model_dump(mode="json")}
        return self._made[convention, letter]

    def _refuse_too_few(self, facts: list[LetterProbe]) -> None:
        settings = self.settings
        passed = [fact.letter for fact in facts if fact.passed]
        if len(passed) >= settings.min_letters:
            return
        scarce = [fact.letter for fact in facts if fact.f1 is None]
        weak = [f"{fact.letter} {fact.f1:.2f}" for fact in facts if fact.f1 is not None and not fact.passed]
        raise UserError(
            f"absorption cannot be measured here: the first letter of {len(passed)} letters can be read from the "
            f"encoder's input, and {settings.min_letters} are needed. With fewer than {settings.min_words} words on "
            f"either side: {', '.join(scarce) or 'none'}; with a probe F1 of at most {settings.min_probe_f1}: "
            f"{', '.join(weak) or 'none'}. Harvest more text, use --split train for more test words, or accept fewer "
            f"letters with --set evaluate.absorption.min_letters={max(1, len(passed))}"
        )
