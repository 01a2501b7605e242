"""`evaluate absorption`: how often a first-letter latent stays silent because another latent fires instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.tokens import TokenTexts
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job
from ...config import EvaluateConfig
from ...measures.bootstrap import mean_over_classes
from ...measures.probe import require_sklearn
from ...measures.row_acts import RowActs, encode_rows
from ...resume import Parts
from ...rows.batches import check_rows
from ...rows.words import LETTERS, split_tokens
from ...subject.shard_set import tokenizer_name
from .letter_task import LetterProbes, LetterTask
from .main_latents import find_main_latents
from .readback import Readback, fit_readback, norm_directions
from .result import Absorber, AbsorptionResult, LetterAbsorption, PrefixAbsorption
from .scores import RowScores, score_rows
from .table import absorption_table

_SHOWN = 5
_TILE = 8192


@dataclass(frozen=True, slots=True)
class _Letter:
    facts: LetterAbsorption
    scores: RowScores
    words: np.ndarray


@dataclass(frozen=True, slots=True)
class _Rows:
    """Activations of one transcoder on the three sets of rows, and what they are projected on."""

    train: RowActs
    test: RowActs
    fit: RowActs
    fit_projected: Tensor
    test_projected: Tensor


class AbsorptionAnalysis(Analysis[AbsorptionResult]):
    """First-letter absorption. `tokenizer` is a folder or hub name, by default what the shard set names."""

    name = "absorption"
    result = AbsorptionResult
    shared = ("split", "tokens", "prefix", "seed", "bootstrap")
    unit = "parts"

    def __init__(self, tokenizer: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._tasks: dict[str, LetterTask] = {}

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:  # noqa: ARG002
        """The tokenizer decides which tokens are words and which letters they begin with."""
        return {"tokenizer": self._name(shards)}

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:  # noqa: ARG002
        """The library that fits probes, and rows."""
        require_sklearn()
        check_rows(shards, config.split)

    def make(self, job: Job) -> AbsorptionResult:
        """Raises UserError when too few letters can be read from what the encoder reads."""
        parts = Parts(job.saved)
        task = self._task(job)
        probes = task.probes(job.transcoder, parts)
        return AbsorptionResult(
            **job.facts,
            tokenizer=self._name(job.shards),
            n_train_rows=len(task.train),
            n_test_rows=len(task.test),
            probes=probes.facts,
            prefixes=_prefixes(job.transcoder_on_device(), job.name, task, probes, parts),
        )

    def tables(self, results: Sequence[AbsorptionResult]) -> list[ResultTable]:
        """One of each run."""
        return [absorption_table(one) for one in results]

    def _name(self, shards: ShardSet) -> str:
        return self._tokenizer or tokenizer_name(shards)

    def _task(self, job: Job) -> LetterTask:
        """Rows and probes of a shard set are the same for all runs."""
        shards = job.shards
        if shards.digest not in self._tasks:
            revision = shards.manifest.model.get("revision")
            texts = TokenTexts.read(self._name(shards), revision=revision, near=Path(shards.path))
            self._tasks[shards.digest] = LetterTask(shards, job.config, texts, job.progress)
        return self._tasks[shards.digest]


def _prefixes(
    transcoder: Transcoder, name: str, task: LetterTask, probes: LetterProbes, parts: Parts
) -> tuple[PrefixAbsorption, ...]:
    """The scores of each nested prefix; of the last alone where one prefix was asked for."""
    rows = cache(lambda: _encode(transcoder, task, probes))
    ends = transcoder.prefix_ends if task.config.prefix is None else transcoder.prefix_ends[-1:]
    if any(f"prefix {end}" not in parts for end in ends):
        rows()
    n_rows = len(probes.probes) * len(task.test)
    task.progress.started(name, len(ends) * n_rows)
    found = []
    for end in ends:
        if f"prefix {end}" in parts:
            task.progress.advanced(n_rows)
        made = parts.made(f"prefix {end}", lambda end=end: _prefix(end, rows(), task, probes).model_dump(mode="json"))
        found.append(PrefixAbsorption.model_validate(made))
    return tuple(found)


def _encode(transcoder: Transcoder, task: LetterTask, probes: LetterProbes) -> _Rows:
    directions = torch.from_numpy(np.stack([probe.direction() for probe in probes.probes.values()], axis=1)).float()
    everything = torch.cat([directions, norm_directions(transcoder.config.d_in, task.config.seed)], dim=1)
    context, position = fit_positions(task)
    source = task.gather("train", context, position, "rows of the read-back")
    codes, projected = [], []
    for tile in source.split(_TILE):
        x = task.inputs(tile, transcoder)
        codes.append(encode_rows(transcoder, x))
        projected.append(x @ everything)
    device = transcoder.device
    test = task.inputs(task.test_source, transcoder)
    return _Rows(
        train=encode_rows(transcoder, task.inputs(task.train_source, transcoder)),
        test=encode_rows(transcoder, test),
        fit=_joined(codes),
        fit_projected=torch.cat(projected).to(device),
        test_projected=(test @ directions).to(device),
    )


def fit_positions(task: LetterTask) -> tuple[Tensor, Tensor]:
    """Rows of the train split for the read-back, evenly spread and never a test row: contexts and positions."""
    _, _, keep = split_tokens(task.shards.train, task.settings.train_tokens, task.shards.ctx_len)
    if task.config.split == "train":
        keep[task.test.context, task.test.position] = False
    context, position = keep.nonzero(as_tuple=True)
    n = min(len(context), task.settings.readback_tokens)
    chosen = torch.linspace(0, len(context) - 1, n, dtype=torch.float64).round().long()
    return context[chosen], position[chosen]


def _joined(codes: list[RowActs]) -> RowActs:
    counts = torch.cat([part.starts.diff() for part in codes])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    latent, value = (torch.cat([getattr(part, name) for part in codes]) for name in ("latent", "value"))
    return RowActs(codes[0].n_latents, starts, latent, value)


def _prefix(end: int, rows: _Rows, task: LetterTask, probes: LetterProbes) -> PrefixAbsorption:
    train, test = rows.train.prefix(end), rows.test.prefix(end)
    readback = fit_readback(rows.fit.prefix(end), rows.fit_projected)
    letters, without = [], []
    for column, letter in enumerate(probes.probes):
        found = _letter(letter, column, train, test, rows.test_projected, readback, task, probes)
        letters.append(found) if found is not None else without.append(letter)
        task.progress.advanced(len(task.test))
    return _mean(end, letters, without, task.config)


def _letter(
    letter: str,
    column: int,
    train: RowActs,
    test: RowActs,
    projected: Tensor,
    readback: Readback,
    task: LetterTask,
    probes: LetterProbes,
) -> _Letter | None:
    number, config = LETTERS.index(letter), task.config
    y_train, y_test = (places.letters().numpy() == number for places in (task.train, task.test))
    main = find_main_latents(train, y_train, test, y_test, jump=config.absorption.f1_jump, seed=config.seed)
    if not main.latents:
        return None
    right = torch.from_numpy(probes.right[letter]).to(test.latent.device)
    scores = score_rows(
        test.rows(right),
        (projected[right, column] - readback.intercept[column]).double().cpu().numpy(),
        readback.along[:, column].double().cpu().numpy(),
        readback.cosine()[:, column].double().cpu().numpy(),
        main.latents,
    )
    words = task.test.word.numpy()[probes.right[letter]]
    facts = LetterAbsorption(
        letter=letter,
        n_true_positives=len(words),
        main_latents=main.latents,
        k_sparse_f1=main.f1,
        absorption_fraction=float(scores.fraction.mean()),
        full_absorption=float(scores.full.mean()),
        missed=float(scores.missed.mean()),
        absorbers=tuple(
            Absorber(latent=latent, n_rows=n, words=_words(scores.absorber == latent, words, task.test.words))
            for latent, n in sorted(scores.absorbers().items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN]
        ),
    )
    return _Letter(facts, scores, words)


def _words(chosen: np.ndarray, words: np.ndarray, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({names[word] for word in words[chosen]})[:_SHOWN])


def _mean(end: int, letters: list[_Letter], without: list[str], config: EvaluateConfig) -> PrefixAbsorption:
    means: dict[str, Any] = {}
    names = {"absorption_fraction": "fraction", "full_absorption": "full", "missed": "missed"}
    for name, score in names.items():
        point, interval = None, None
        if letters:
            values = [getattr(letter.scores, score) for letter in letters]
            point, interval = mean_over_classes(
                values, [letter.words for letter in letters], config.bootstrap, config.seed
            )
        means |= {name: point, f"{name}_interval": interval}
    facts = [letter.facts for letter in letters]
    return PrefixAbsorption(
        prefix_end=end,
        n_letters=len(facts),
        letters_without_latent=tuple(without),
        **means,
        n_main_latents=float(np.mean([len(fact.main_latents) for fact in facts])) if facts else None,
        main_f1=float(np.mean([fact.k_sparse_f1[len(fact.main_latents) - 1] for fact in facts])) if facts else None,
        letters=tuple(facts),
    )
