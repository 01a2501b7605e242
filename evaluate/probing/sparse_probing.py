"""`evaluate probing`: how well a handful of latents tell classes apart that are known from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.runs import make_directory
from matryoshka.shards import ShardSet
from matryoshka.tokens import TokenTexts
from matryoshka.transcoder import Transcoder

from ..analysis import Progress, Silent, load_transcoder
from ..checkpoint import Checkpoint, expand_fleets, find_checkpoint
from ..config import EvaluateConfig
from ..result import ShardSetFacts, TranscoderFacts, already_answered, identity_of, result_folder
from ..shard_set import tokenizer_name
from .examples import Side, choose, is_held_out_document, keep_side, pooled_documents, read_side, side_rows, token_rows
from .k_probes import Examples, KProbe, balanced, dense_top_k, k_sparse
from .labels import read_labels
from .measured import Measured
from .probe import Quality, require_sklearn
from .probing_file import (
    PROBING_FILE,
    ClassScore,
    KScore,
    LabelSet,
    PrefixProbes,
    ProbedClass,
    ProbingResult,
    Score,
    read_probing,
    write_probing,
)

TOKEN_SETS = ("first_letter", "token_kind", "document_start")


@dataclass(frozen=True, slots=True)
class Sides:
    """A label set with its inputs and codes."""

    name: str
    unit: Literal["token", "document"]
    names: tuple[str, ...]
    train: Side
    test: Side


def probe_runs(
    runs: Sequence[Path],
    config: EvaluateConfig,
    labels: Path | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> list[Measured[ProbingResult]]:
    """Publish probing.json for each of `runs`, or read the one that answers already.

    `labels` adds a label set of documents. Raises UserError for whatever the user can mend.
    """
    if config.shards is None:
        raise UserError("no shard set was named; pass --shards, for example --shards data/l17")
    require_sklearn()
    shards = ShardSet.open(config.shards)
    name = tokenizer or tokenizer_name(shards)
    texts = TokenTexts.read(name, revision=shards.manifest.model.get("revision"), near=Path(shards.path))
    documents = None if labels is None else read_labels(labels)
    probing = _Probing(shards, config, texts, documents, name, progress or Silent())
    return [probing.measure(find_checkpoint(run)) for run in expand_fleets(list(runs))]


@dataclass(frozen=True)
class _Probing:
    shards: ShardSet
    config: EvaluateConfig
    texts: TokenTexts
    documents: dict[int, str] | None
    tokenizer: str
    progress: Progress

    def measure(self, checkpoint: Checkpoint) -> Measured[ProbingResult]:
        """One run."""
        config, shards = self.config, self.shards
        transcoder = load_transcoder(checkpoint, shards, config)
        folder = result_folder(checkpoint, shards, config)
        settings = self._settings()
        existing, changes = already_answered(read_probing(folder), identity_of(checkpoint, shards, settings))
        if existing is not None:
            return Measured(checkpoint, folder / PROBING_FILE, existing, is_new=False)
        make_directory(folder)
        transcoder = transcoder.to(resolve_device(config.device))
        skipped: dict[str, str] = {}
        sets = [self._probe(sides, transcoder) for sides in self._sides(transcoder, skipped)]
        result = ProbingResult(
            transcoder=TranscoderFacts.of(checkpoint, transcoder),
            shard_set=ShardSetFacts.of(shards, config.split),
            settings=settings,
            tokenizer=self.tokenizer,
            sets=tuple(sets),
            skipped=skipped,
        )
        return Measured(checkpoint, write_probing(folder, result), result, is_new=True, replaced=changes)

    def _settings(self) -> dict[str, Any]:
        shared = {name: getattr(self.config, name) for name in ("split", "tokens", "prefix", "seed")}
        labels = None
        if self.documents is not None:
            labels = hashlib.sha256(repr(sorted(self.documents.items())).encode()).hexdigest()
        own = {"labels_sha256": labels, "tokenizer": self.tokenizer}
        return shared | self.config.probing.model_dump(mode="json") | own

    def _sides(self, transcoder: Transcoder, skipped: dict[str, str]) -> Iterator[Sides]:
        """Every label set that has two classes with enough examples; the others go into `skipped`."""
        for name in self.config.probing.sets:
            sides = self._token_set(name, transcoder)
            if sides is None:
                skipped[name] = f"fewer than two classes have {self.config.probing.min_examples} rows on either side"
            else:
                yield sides
        if self.documents is not None:
            yield self._document_set(transcoder, self.documents)

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
        sides = self._enough(Sides("labels", "document", tuple(names), train, test))
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
        dense: dict[int | None, list[Quality]] = {k: [] for k in (None, *settings.ks)}
        for on, scored_on in examples.values():
            for k, found in dense.items():
                c = settings.dense_c if k is None else 1.0
                found.append(dense_top_k(x_train, on, x_test, scored_on, k, c))
            self.progress.advanced(1)
        prefixes = []
        for end in ends:
            train, test = sides.train.codes.prefix(end), sides.test.codes.prefix(end)
            found = {}
            for number, (on, scored_on) in examples.items():
                found[sides.names[number]] = k_sparse(train, on, test, scored_on, settings.ks)
                self.progress.advanced(1)
            prefixes.append(PrefixProbes(prefix_end=end, scores=tuple(_scores(found, settings.ks))))
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
            source=_mean(None, dense[None]),
            source_top_k=tuple(_mean(k, dense[k]) for k in settings.ks),
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
