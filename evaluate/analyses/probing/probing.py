"""`evaluate probing`: how well a handful of latents tell classes apart that are known from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.tokens import TokenTexts
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job, Progress
from ...config import EvaluateConfig
from ...measures.probe import Quality, require_sklearn
from ...resume import Parts
from ...rows.batches import check_rows
from ...subject.shard_set import tokenizer_name
from .examples import Side, choose, is_held_out_document, keep_side, pooled_documents, read_side, side_rows, token_rows
from .k_probes import Examples, KProbe, balanced, dense_top_k, k_sparse
from .labels import read_labels
from .result import ClassScore, KScore, LabelSet, PrefixProbes, ProbedClass, ProbingResult, Score
from .table import probing_table

DOCUMENT_SET = "labels"
"""Name of the label set that the user brings."""


@dataclass(frozen=True, slots=True)
class Sides:
    """A label set with its inputs and codes."""

    name: str
    unit: Literal["token", "document"]
    names: tuple[str, ...]
    train: Side
    test: Side


class ProbingAnalysis(Analysis[ProbingResult]):
    """Sparse probing. `labels` is a file with a label set of documents; `tokenizer` a folder or hub name."""

    name = "probing"
    result = ProbingResult
    shared = ("split", "tokens", "prefix", "seed")
    unit = "parts"

    def __init__(self, labels: Path | None = None, tokenizer: str | None = None) -> None:
        self._documents = None if labels is None else read_labels(labels)
        self._tokenizer = tokenizer
        self._texts: dict[str, TokenTexts] = {}

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:  # noqa: ARG002
        """The labels that were brought, and the tokenizer, which decides how a token is labelled."""
        labels = None
        if self._documents is not None:
            labels = hashlib.sha256(repr(sorted(self._documents.items())).encode()).hexdigest()
        return {"labels_sha256": labels, "tokenizer": self._name(shards)}

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:  # noqa: ARG002
        """The library that fits probes, and rows."""
        require_sklearn()
        check_rows(shards, config.split)

    def make(self, job: Job) -> ProbingResult:
        """One label set after the other."""
        parts, shards = Parts(job.saved), job.shards
        if shards.digest not in self._texts:
            revision = shards.manifest.model.get("revision")
            self._texts[shards.digest] = TokenTexts.read(self._name(shards), revision=revision, near=Path(shards.path))
        probing = _Probing(shards, job.config, self._texts[shards.digest], self._documents, job.progress, parts)
        transcoder = job.transcoder_on_device()
        sets, skipped = [], {}
        for name in (*job.config.probing.sets, *([] if self._documents is None else [DOCUMENT_SET])):
            made = parts.made(name, partial(probing.label_set, name, transcoder))
            if made is None:
                skipped[name] = f"fewer than two classes have {job.config.probing.min_examples} rows on either side"
            else:
                sets.append(LabelSet.model_validate(made))
        return ProbingResult(**job.facts, tokenizer=self._name(shards), sets=tuple(sets), skipped=skipped)

    def tables(self, results: Sequence[ProbingResult]) -> list[ResultTable]:
        """One of each run."""
        return [probing_table(one) for one in results]

    def _name(self, shards: ShardSet) -> str:
        return self._tokenizer or tokenizer_name(shards)


@dataclass(frozen=True)
class _Probing:
    shards: ShardSet
    config: EvaluateConfig
    texts: TokenTexts
    documents: dict[int, str] | None
    progress: Progress
    parts: Parts

    def label_set(self, name: str, transcoder: Transcoder) -> dict[str, Any] | None:
        """A LabelSet as JSON; None unless two classes have enough examples on either side."""
        if name == DOCUMENT_SET:
            assert self.documents is not None
            sides = self._document_set(transcoder, self.documents)
        else:
            sides = self._token_set(name, transcoder)
        return None if sides is None else self._probe(sides, transcoder).model_dump(mode="json")

    def _token_set(self, name: str, transcoder: Transcoder) -> Sides | None:
        config, settings = self.config, self.config.probing
        splits = (("train", settings.train_tokens, False), (config.split, config.tokens, True))
        # Of documents, val holds others than train; a token's text occurs in both.
        by_hash = name != "document_start" or config.split == "train"
        found = []
        for split, limit, held_out in splits:
            rows = token_rows(name, self.shards, self.texts, split, limit)
            if by_hash:
                rows = keep_side(rows, held_out=held_out, share=settings.test_share, seed=config.seed)
            found.append(rows)
        names = sorted(set(found[0].label) & set(found[1].label))
        classes = {label: number for number, label in enumerate(names)}
        sides = []
        for rows, (split, _, held_out) in zip(found, splits, strict=True):
            most = settings.test_examples if held_out else settings.train_examples
            per_key = most if name == "document_start" else settings.per_token
            chosen = choose(rows, classes, per_key=per_key, most=most, seed=config.seed)
            sides.append(read_side(chosen, split, self.shards, transcoder, f"{name} ({split})", self.progress))
        return self._enough(Sides(name, "token", tuple(names), *sides))

    def _document_set(self, transcoder: Transcoder, documents: dict[int, str]) -> Sides:
        config, settings = self.config, self.config.probing
        names = sorted({*documents.values()})
        numbered = {doc: names.index(label) for doc, label in documents.items()}
        splits = (("train", settings.train_tokens), (config.split, config.tokens))
        (train_ids, train), (test_ids, test) = (
            pooled_documents(numbered, split, limit, self.shards, transcoder, config, self.progress)
            for split, limit in splits
        )
        if config.split == "train":
            held_out = [is_held_out_document(doc, settings.test_share, config.seed) for doc in test_ids]
            test = side_rows(test, torch.tensor(held_out, dtype=torch.bool))
            test_ids = [doc for doc, held in zip(test_ids, held_out, strict=True) if held]
        # A long document may have blocks of contexts in either split.
        tested = set(test_ids)
        train = side_rows(train, torch.tensor([doc not in tested for doc in train_ids], dtype=torch.bool))
        sides = self._enough(Sides(DOCUMENT_SET, "document", tuple(names), train, test))
        if sides is None:
            raise UserError(
                f"the labels file has fewer than two classes with {settings.min_examples} documents on either side: "
                f"{len(train.label)} of its documents are in the train split and {len(test.label)} in the test. Label "
                "more, or lower it with --set evaluate.probing.min_examples"
            )
        return sides

    def _enough(self, sides: Sides) -> Sides | None:
        """None unless two classes have enough rows on either side."""
        return sides if len(self._classes(sides)) >= 2 else None

    def _classes(self, sides: Sides) -> list[int]:
        counts = [torch.bincount(side.label, minlength=len(sides.names)) for side in (sides.train, sides.test)]
        return (torch.minimum(*counts) >= self.config.probing.min_examples).nonzero().squeeze(1).tolist()

    def _probe(self, sides: Sides, transcoder: Transcoder) -> LabelSet:
        config, settings = self.config, self.config.probing
        numbers = self._classes(sides)
        generator = torch.Generator().manual_seed(config.seed)
        ends = transcoder.prefix_ends if config.prefix is None else transcoder.prefix_ends[-1:]
        self.progress.started(f"probes of {sides.name}", len(numbers) * (len(ends) + 1))
        examples: dict[int, tuple[Examples, Examples]] = {}
        for number in numbers:
            on = balanced(sides.train.label, number, settings.train_examples, generator)
            examples[number] = on, balanced(sides.test.label, number, settings.test_examples, generator)
        x_train, x_test = sides.train.x.numpy(), sides.test.x.numpy()

        def input_scores() -> list[dict[str, Any]]:
            found: dict[int | None, list[Quality]] = {k: [] for k in (None, *settings.ks)}
            for on, scored_on in examples.values():
                for k, qualities in found.items():
                    c = settings.dense_c if k is None else 1.0
                    qualities.append(dense_top_k(x_train, on, x_test, scored_on, k, c))
                self.progress.advanced(1)
            return [_mean(k, qualities).model_dump(mode="json") for k, qualities in found.items()]

        def prefix_scores(end: int) -> dict[str, Any]:
            train, test = sides.train.codes.prefix(end), sides.test.codes.prefix(end)
            found = {}
            for number, (on, scored_on) in examples.items():
                found[sides.names[number]] = k_sparse(train, on, test, scored_on, settings.ks)
                self.progress.advanced(1)
            scores = tuple(_scores(found, settings.ks))
            return PrefixProbes(prefix_end=end, scores=scores).model_dump(mode="json")

        n_done = sum(f"{sides.name} {part}" in self.parts for part in ("input", *ends))
        self.progress.advanced(n_done * len(examples))
        source, *source_top_k = map(Score.model_validate, self.parts.made(f"{sides.name} input", input_scores))
        prefixes = [
            PrefixProbes.model_validate(self.parts.made(f"{sides.name} {end}", partial(prefix_scores, end)))
            for end in ends
        ]
        return LabelSet(
            name=sides.name,
            unit=sides.unit,
            classes=tuple(
                ProbedClass(label=sides.names[number], n_train=len(on.rows), n_test=len(scored_on.rows))
                for number, (on, scored_on) in examples.items()
            ),
            left_out=tuple(name for number, name in enumerate(sides.names) if number not in examples),
            majority_accuracy=float(
                np.mean([max(e.is_class.mean(), 1 - e.is_class.mean()) for _, e in examples.values()])
            ),
            source=source,
            source_top_k=tuple(source_top_k),
            prefixes=tuple(prefixes),
        )


def _mean(k: int | None, found: list[Quality]) -> Score:
    accuracy, f1 = (float(np.mean([getattr(one, name) for one in found])) for name in ("accuracy", "f1"))
    return Score(k=k, accuracy=accuracy, f1=f1)


def _scores(found: dict[str, list[KProbe]], ks: tuple[int, ...]) -> Iterator[KScore]:
    for index, k in enumerate(ks):
        probes = {label: probes[index] for label, probes in found.items()}
        mean = _mean(k, [probe.quality for probe in probes.values()])
        classes = tuple(
            ClassScore(
                label=label,
                latents=probe.latents,
                accuracy=probe.quality.accuracy,
                precision=probe.quality.precision,
                recall=probe.quality.recall,
                f1=probe.quality.f1,
            )
            for label, probe in probes.items()
        )
        yield KScore(k=k, accuracy=mean.accuracy, f1=mean.f1, classes=classes)
