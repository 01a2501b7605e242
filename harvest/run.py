"""One harvest: text -> language model -> paired activations of each shard -> committed shards of one or more sets.

The life of a token: a document (text.py) is tokenised and packed into a context (packing.py); the contexts of one
shard go through the model in batches (capture.py), once for all sets; source and target of each set are copied,
position-major, into the buffers of the shard; background threads encode, write and commit it (matryoshka/shards) while
the model runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from typing import Any

import torch

from matryoshka.lm import LanguageModel
from matryoshka.ranks import Rank
from matryoshka.shards import CommitRecord, Manifest, ShardSetWriter
from matryoshka.shards.committed_text import CommittedText
from matryoshka.shards.records import read_records

from .background import background
from .capture import Capture
from .config import HarvestConfig
from .enough_text import check_text, noting_the_end, too_little_text
from .estimate import Estimate, estimate, together
from .packing import SPLIT_ORDER, Packing, ShardJob, split_jobs
from .progress import NoProgress, Progress, usual_progress
from .same_model import check_finished
from .sets import HarvestResult, Target, bos_of, pad_of
from .text import BadLines, dataset_facts, documents

_PATIENCE = timedelta(days=7)
"""How long a rank may wait for another; one that fails ends the others through torchrun at once."""
_WRITERS = 4
"""Sets whose shards are encoded at the same time."""
_FIRST_BATCH = 1
"""With `--batch-size auto`, until it is found."""


@dataclass(frozen=True, slots=True)
class _Set:
    """A shard set that is to be made, and the manifest to open it with."""

    target: Target
    manifest: Manifest

    @property
    def n_tokens(self) -> int:
        """Tokens of all its planned shards."""
        return sum(plan.n_contexts for plan in self.manifest.splits.values()) * self.manifest.ctx_len


@dataclass(frozen=True, slots=True)
class _Pass:
    """Sets whose contexts are in shards of the same sizes: one forward pass serves them all."""

    sets: tuple[_Set, ...]
    first: Mapping[str, ShardJob]
    """The first job of each split."""
    jobs: Iterator[ShardJob]
    """All of them."""


def harvest(config: HarvestConfig, progress: Progress | None = None) -> list[HarvestResult]:
    """Make the shard sets that `config` describes, or what is missing of them; one result for each, in its order.

    Without `progress` a bar is shown in a notebook, and nothing elsewhere.
    Raises UserError for invalid input; whatever was committed stays.
    """
    ranks = Rank.from_environment()
    targets = [Target(member) for member in config.members()]
    with ranks.together(patience=_PATIENCE), ExitStack() as shown:
        if not ranks.is_first:
            progress = NoProgress()
        elif progress is None:
            progress = shown.enter_context(usual_progress())
        # Everything that can be refused without the model is refused before it is loaded.
        todo = _unfinished(targets, config)
        ranks.wait()  # so that none finds a set half changed by another
        written = dict.fromkeys((target.folder for target in targets), 0)
        if todo:
            bad_lines = BadLines()
            lm, sets, passes = _prepare(config, todo, ranks, bad_lines)
            capture = Capture(lm, _FIRST_BATCH if config.batch_size == "auto" else config.batch_size)
            if config.batch_size == "auto":
                # The first rank measures; all ranks ask for its answer alike.
                capture.batch_size = ranks.agree(_tuned(capture, passes[0]) if ranks.is_first else 0)

            with ExitStack() as stack:
                rest = None
                if ranks.is_first:
                    rest = _cost(sets, capture, passes, ranks)
                    rest.check(todo[0].folder)
                    for target in todo:
                        target.storage.make()
                        stack.enter_context(target.storage.exclusive())
                writers = _open(sets, lm, ranks)
                if rest is not None:
                    progress.started(rest, sum(max(s.n_tokens for s in one.sets) for one in passes))
                for one in passes:
                    written |= _run_jobs(one, writers, capture, ranks, progress)
                ranks.wait()
                if ranks.is_first:
                    for target in todo:
                        writers[target.folder].finish(bad_lines.counts())
            ranks.wait()
        return [target.result(written[target.folder]) for target in targets]


def plan(config: HarvestConfig, noted: Callable[[str], None] = lambda _: None) -> Estimate:
    """What `harvest` would cost now, measured by two forward passes; nothing is written. `noted` is told when the text
    is known to be too short.

    Raises UserError as `harvest` does before it starts, except that a disk which is too small is no error here.
    """
    ranks = Rank()
    todo = _unfinished([Target(member) for member in config.members()], config)
    if not todo:
        return estimate_nothing(config)
    lm, sets, passes = _prepare(config, todo, ranks, BadLines())
    for one in passes:
        # The first job alone: one that is short has read the whole text.
        next(noting_the_end(iter([one.first["val"]]), one.sets[0].manifest.splits, noted))
    capture = Capture(lm, _FIRST_BATCH if config.batch_size == "auto" else config.batch_size)
    if config.batch_size == "auto":
        capture.batch_size = _tuned(capture, passes[0])
    return _cost(sets, capture, passes, ranks)


def estimate_nothing(config: HarvestConfig) -> Estimate:
    """The cost of sets that are finished."""
    target = Target(config.members()[0])
    saved = target.begun()
    assert saved is not None
    return estimate(saved, 0, target.storage, None)


def tokenize(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens; "<bos>" written in a text is text, not a BOS token."""
    return lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _prepare(
    config: HarvestConfig, todo: list[Target], ranks: Rank, bad_lines: BadLines
) -> tuple[LanguageModel, list[_Set], list[_Pass]]:
    """Load the model, and find out which shards are to be made. Nothing is written."""
    facts = {target.folder: _dataset(config, target) for target in todo}
    for found in [facts[target.folder] for target in todo if target.begun() is None][:1]:
        check_text(config, found)
    lm = LanguageModel.load(
        config.model, revision=config.revision, dtype=config.dtype, device=ranks.device(config.device)
    )
    for target in todo:
        target.check_fits(lm)
    sets = [_Set(target, target.manifest(lm, facts[target.folder])) for target in todo]
    groups: dict[str, list[_Set]] = {}
    for one in sets:
        plans = {name: plan.model_dump() for name, plan in one.manifest.splits.items()}
        groups.setdefault(f"{plans} {facts[one.target.folder]}", []).append(one)
    return lm, sets, [_begin(config, tuple(group), lm, bad_lines) for group in groups.values()]


def _unfinished(targets: list[Target], config: HarvestConfig) -> list[Target]:
    """Those that are to be made. Raises UserError where a finished one is of another model than there is now."""
    finished = {target.folder: target.begun() for target in targets if target.is_finished()}
    check_finished([(folder, saved) for folder, saved in finished.items() if saved is not None], config.model)
    return [target for target in targets if target.folder not in finished]


def _dataset(config: HarvestConfig, target: Target) -> dict[str, Any]:
    saved = target.begun()
    return dataset_facts(config, None if saved is None else saved.dataset)


def _begin(config: HarvestConfig, sets: tuple[_Set, ...], lm: LanguageModel, bad_lines: BadLines) -> _Pass:
    packing = Packing(
        ctx_len=config.ctx_len,
        bos_id=bos_of(config, lm),
        val_fraction=config.val_fraction,
        seed=config.seed,
        pad_id=pad_of(config, lm),
        max_doc_tokens=config.max_doc_tokens,
        val_unit=config.val_unit,
    )
    manifest = sets[0].manifest
    specials = torch.tensor(manifest.special_ids, dtype=torch.int32)

    def jobs_of(split: str) -> Iterator[ShardJob]:
        texts = documents(config, manifest.dataset, bad_lines)
        return split_jobs(split, texts, lambda texts: tokenize(lm, texts), packing, manifest.splits[split])

    _check_changed_files(sets, jobs_of)
    first: dict[str, ShardJob] = {}
    rest: dict[str, Iterator[ShardJob]] = {}
    for split in SPLIT_ORDER:
        jobs = jobs_of(split)
        job = next(jobs, None)
        if job is None or bool(torch.isin(job.tokens, specials).all()):
            raise too_little_text(split, config, packing, manifest.dataset, is_special=job is not None)
        first[split], rest[split] = job, jobs
    everything = chain.from_iterable(chain([first[split]], rest[split]) for split in SPLIT_ORDER)
    return _Pass(sets, first, everything)


def _check_changed_files(sets: tuple[_Set, ...], jobs_of: Callable[[str], Iterator[ShardJob]]) -> None:
    """Where the files are not those of before, hold every committed shard against their text before anything is done.

    Without this, a shard of the new text could be written before one of the old text is met.
    """
    changed = []
    for one in sets:
        saved = one.target.begun()
        if saved is not None and saved.dataset != one.manifest.dataset and read_records(one.target.storage):
            changed.append(CommittedText(one.target.storage))
    for split in SPLIT_ORDER:
        n_shards = max((text.n_shards(split) for text in changed), default=0)
        for job in islice(jobs_of(split), n_shards):
            for text in changed:
                text.check(job.split, job.shard, job.tokens, job.doc_ids)


def _tuned(capture: Capture, one: _Pass) -> int:
    return capture.tune(one.first["train"].tokens, _hook_points(one.sets))


def _cost(sets: list[_Set], capture: Capture, passes: list[_Pass], ranks: Rank) -> Estimate:
    """What is missing of the sets, as one estimate. Tokens that are missing in several go through the model once."""
    missing, parts = {}, []
    for one in sets:
        folder = one.target.folder
        records = read_records(one.target.storage)
        missing[folder] = one.n_tokens - sum(record.n_contexts for record in records) * one.manifest.ctx_len
        parts.append(estimate(one.manifest, missing[folder], one.target.storage, None, records))
    n_tokens = sum(max(missing[s.target.folder] for s in one.sets) for one in passes)
    speed = capture.speed(passes[0].first["train"].tokens, _hook_points(passes[0].sets)) * ranks.world
    return together(parts, n_tokens, n_tokens / speed)


def _open(sets: list[_Set], lm: LanguageModel, ranks: Rank) -> dict[Any, ShardSetWriter]:
    """Folder -> writer. The first rank makes or completes the folders, then the others join."""

    def writer(one: _Set) -> ShardSetWriter:
        start = ShardSetWriter.open if ranks.is_first else ShardSetWriter.join
        return start(one.target.storage, one.manifest, one.target.norm(lm))

    if not ranks.is_first:
        ranks.wait()
    writers = {one.target.folder: writer(one) for one in sets}
    if ranks.is_first:
        ranks.wait()
    return writers


def _run_jobs(
    one: _Pass,
    writers: dict[Any, ShardSetWriter],
    capture: Capture,
    ranks: Rank,
    progress: Progress,
) -> dict[Any, int]:
    """Make the shards of this rank; folder -> how many were written by it."""
    written = {s.target.folder: 0 for s in one.sets}

    def advanced(n_tokens: int) -> None:
        progress.advanced(n_tokens, sum(writer.bytes_written() for writer in writers.values()))

    for job in one.first.values():
        _uncommitted(one, writers, job)  # text that has changed shows before anything of it is written
    with background(min(_WRITERS, len(one.sets))) as executor:
        pending: list[Future[CommitRecord]] = []
        jobs = noting_the_end(one.jobs, one.sets[0].manifest.splits, progress.noted)
        for number, job in enumerate(jobs):
            if not ranks.owns(number):
                advanced(job.tokens.numel())
                continue
            missing = _uncommitted(one, writers, job)
            if not missing:
                advanced(job.tokens.numel())
                continue
            found = capture.shard(job.tokens, _hook_points(missing), advanced)
            # One shard is written while one is captured, never more: this bounds the memory.
            _settle(pending)
            for s in missing:
                source, target = (found[name] for name in s.target.hook_points)
                writer = writers[s.target.folder]
                pending.append(
                    executor.submit(writer.write_shard, job.split, job.shard, job.tokens, job.doc_ids, source, target)
                )
                written[s.target.folder] += 1
        _settle(pending)
    advanced(0)
    return written


def _uncommitted(one: _Pass, writers: Mapping[Any, ShardSetWriter], job: ShardJob) -> list[_Set]:
    """The sets that do not have this shard yet. Raises UserError where one has it of another text."""
    missing = []
    for s in one.sets:
        writer = writers[s.target.folder]
        if writer.is_committed(job.split, job.shard):
            writer.check_same_text(job.split, job.shard, job.tokens, job.doc_ids)
        else:
            missing.append(s)
    return missing


def _settle(pending: list[Future[CommitRecord]]) -> None:
    while pending:
        pending.pop(0).result()


def _hook_points(sets: list[_Set] | tuple[_Set, ...]) -> list[str]:
    """Each once: sets may share a site."""
    return list(dict.fromkeys(name for one in sets for name in one.target.hook_points))
