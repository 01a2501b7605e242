"""One harvest: text -> language model -> paired activations of each shard -> committed shards.

The life of a token: a document (text.py) is tokenised and packed into a context (packing.py); the contexts of one
shard go through the model in batches; source and target of each are copied, position-major, into the buffer of the
shard; a background thread encodes, writes and commits it (matryoshka/shards) while the model runs on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.runs import changed_fields, exclusive, make_directory, provenance, refuse_changes
from matryoshka.shards import CommitRecord, Manifest, ShardSet, ShardSetWriter, SiteFacts, plan_splits
from matryoshka.shards.manifest import MANIFEST_FOLDER, NormFacts
from matryoshka.shards.reader import has_manifest, read_manifest, read_records
from matryoshka.shards.writer import check_place
from matryoshka.sites import HookPair, Site

from .config import HarvestConfig
from .estimate import Estimate, estimate
from .packing import Packing, ShardJob, shard_jobs
from .text import dataset_facts, documents


class Progress(Protocol):
    """What a harvest tells of itself while it works."""

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """Everything is checked and the first shard is about to be made."""
        ...

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """`n_tokens` more have been through the model, or were committed by an earlier run."""
        ...


class Silent:
    """Progress for nobody."""

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """Say nothing."""

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class HarvestResult:
    """What a harvest leaves behind."""

    path: Path
    n_shards_written: int
    """0 when an earlier run had finished the set."""
    n_tokens: int
    n_tokens_planned: int
    bytes_on_disk: int


def harvest(config: HarvestConfig, progress: Progress | None = None) -> HarvestResult:
    """Make the shard set that `config` describes, or what is missing of it.

    Raises UserError for anything that the user can mend; whatever was committed stays.
    """
    progress = progress or Silent()
    folder = config.folder()
    # Everything that can be refused without the model is refused before it is loaded.
    check_place(folder)
    if is_finished(folder, config):
        return _result(folder, config, 0)
    dataset = dataset_facts(config)
    lm = LanguageModel.load(config.model, revision=config.revision, dtype=config.dtype, device=config.device)
    pair = config.pair()
    _check_fits(lm, config, pair)
    manifest = _manifest(lm, config, pair, dataset)
    if has_manifest(folder):
        # Shards of another size would not fit the arrays there are, so the plan of a begun set stands.
        manifest = manifest.model_copy(update={"splits": read_manifest(folder).splits})
    jobs = shard_jobs(
        documents(config),
        lambda texts: tokenize(lm, texts),
        Packing(ctx_len=config.ctx_len, bos_id=lm.bos_id, val_fraction=config.val_fraction, seed=config.seed),
        manifest.splits,
    )
    first = next(jobs, None)
    if first is None:
        raise UserError(
            f"the text of {config.dataset} is shorter than one context of {config.ctx_len} tokens in each split; give "
            "more text or a smaller --ctx-len"
        )
    n_done = sum(record.n_contexts for record in read_records(folder)) * config.ctx_len
    n_planned = sum(plan.n_contexts for plan in manifest.splits.values()) * config.ctx_len
    rest = estimate(manifest, n_planned - n_done, folder, _measure_speed(lm, first, pair, config.batch_size))
    rest.check(folder)
    make_directory(folder / MANIFEST_FOLDER)
    with exclusive(folder / MANIFEST_FOLDER):
        writer = ShardSetWriter.open(folder, manifest, lm.norm_before(pair.source.name, pair.source.layer))
        progress.started(rest, n_planned)
        n_written = _run_jobs(chain([first], jobs), lm, pair, writer, config.batch_size, progress)
        writer.finish()
    return _result(folder, config, n_written)


def is_finished(folder: Path, config: HarvestConfig) -> bool:
    """Whether `folder` holds the whole set of exactly these settings. Raises UserError when it holds another one."""
    if not has_manifest(folder):
        return False
    manifest = read_manifest(folder)
    refuse_changes(folder, "harvested", changed_fields(manifest.settings, config.content()))
    return manifest.complete and len(read_records(folder)) == sum(plan.n_shards for plan in manifest.splits.values())


def tokenize(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens; "<bos>" written in a text is text, not a BOS token."""
    return lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _run_jobs(
    jobs: Iterator[ShardJob],
    lm: LanguageModel,
    pair: HookPair,
    writer: ShardSetWriter,
    batch_size: int,
    progress: Progress,
) -> int:
    n_written = 0
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer") as executor:
        pending: Future[CommitRecord] | None = None
        for job in jobs:
            if writer.is_committed(job.split, job.shard):
                writer.check_same_text(job.split, job.shard, job.tokens, job.doc_ids)
                progress.advanced(job.tokens.numel(), writer.bytes_written())
                continue
            source, target = _capture(lm, job.tokens, pair, batch_size, writer, progress)
            if pending is not None:
                # One shard is written while one is captured, never more: this bounds the memory.
                pending.result()
            pending = executor.submit(writer.write_shard, job.split, job.shard, job.tokens, job.doc_ids, source, target)
            n_written += 1
        if pending is not None:
            pending.result()
    progress.advanced(0, writer.bytes_written())
    return n_written


def _capture(
    lm: LanguageModel, tokens: Tensor, pair: HookPair, batch_size: int, writer: ShardSetWriter, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Source and target of the contexts of one shard, position-major bfloat16 [ctx_len, n_contexts, width]."""
    n_contexts, ctx_len = tokens.shape
    sites = (pair.source, pair.target)
    pin = lm.device.type == "cuda"
    buffers = [
        torch.empty(ctx_len, n_contexts, facts.width, dtype=torch.bfloat16, pin_memory=pin)
        for facts in (writer.manifest.source, writer.manifest.target)
    ]
    for start in range(0, n_contexts, batch_size):
        batch = tokens[start : start + batch_size]
        acts = _forward(lm, batch, [site.hook_point for site in sites])
        for buffer, site in zip(buffers, sites, strict=True):
            buffer[:, start : start + len(batch)] = acts[site.hook_point].transpose(0, 1)
        progress.advanced(batch.numel(), writer.bytes_written())
    return buffers[0], buffers[1]


def _forward(lm: LanguageModel, batch: Tensor, hook_points: list[str]) -> dict[str, Tensor]:
    """Activations of `batch` [contexts, ctx_len] at the hook points, [contexts, ctx_len, width] each."""
    try:
        return lm.capture(batch.long(), hook_points)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of {lm.device} does not hold a forward pass of {len(batch)} contexts of {batch.shape[1]} "
            "tokens; use a smaller --batch-size"
        ) from error


def _check_fits(lm: LanguageModel, config: HarvestConfig, pair: HookPair) -> None:
    if pair.deepest_layer >= lm.n_layers:
        raise UserError(
            f"layer {pair.deepest_layer} does not exist: {config.model} has {lm.n_layers} layers, 0 to "
            f"{lm.n_layers - 1}; choose another --layer"
        )
    if lm.n_ctx is not None and config.ctx_len > lm.n_ctx:
        raise UserError(f"ctx_len = {config.ctx_len} is more than the {lm.n_ctx} positions of {config.model}")


def _manifest(lm: LanguageModel, config: HarvestConfig, pair: HookPair, dataset: dict[str, Any]) -> Manifest:
    norm = lm.norm_before(pair.source.name, pair.source.layer)
    facts = None if norm is None else NormFacts(kind=norm.kind, eps=norm.eps, has_bias=norm.bias is not None)
    n_contexts = -(-config.tokens // config.ctx_len)
    return Manifest(
        model=lm.describe(),
        dataset=dataset,
        source=_site_facts(pair.source, lm),
        target=_site_facts(pair.target, lm),
        ctx_len=config.ctx_len,
        bos_id=lm.bos_id,
        special_ids=tuple(lm.special_ids),
        norm=facts,
        codec=config.codec,
        splits=plan_splits(n_contexts, config.val_fraction, config.ctx_len, lm.d_model),
        settings=config.content(),
        versions=provenance(),
    )


def _site_facts(site: Site, lm: LanguageModel) -> SiteFacts:
    return SiteFacts(site=site.name, layer=site.layer, hook_point=site.hook_point, width=lm.d_model)


def _measure_speed(lm: LanguageModel, job: ShardJob, pair: HookPair, batch_size: int) -> float:
    """Tokens per second of one batch, the second of two: the first pays for warming up."""
    batch = job.tokens[:batch_size]
    hooks = [pair.source.hook_point, pair.target.hook_point]
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        acts = _forward(lm, batch, hooks)
        acts[hooks[-1]].cpu()  # waits for the device
        seconds = time.perf_counter() - start
    return batch.numel() / seconds


def _result(folder: Path, config: HarvestConfig, n_written: int) -> HarvestResult:
    shards = ShardSet.open(folder)
    n_contexts = shards.train.n_contexts + shards.val.n_contexts
    return HarvestResult(
        path=folder,
        n_shards_written=n_written,
        n_tokens=n_contexts * shards.ctx_len,
        n_tokens_planned=-(-config.tokens // config.ctx_len) * config.ctx_len,
        bytes_on_disk=shards.bytes_on_disk(),
    )
