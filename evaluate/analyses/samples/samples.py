"""`evaluate samples`: one pass over the val rows, then the windows that show what each latent is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matryoshka.checkpoints import find_checkpoint
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet, Split
from matryoshka.tables import ResultTable
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job
from ...config import EvaluateConfig
from ...rows.batches import check_rows
from ...rows.context_blocks import context_blocks, count_contexts
from ...rows.windows import WindowShape
from ...subject.shard_set import tokenizer_name
from .files import METADATA_FILE, SAMPLES_FOLDER, SamplesMetadata, write_samples
from .sampling import Choice, Sampling
from .selection import N_DECILES, sample_rows, window_tokens

_SAMPLED_PER_KEPT = 2


class SamplesAnalysis(Analysis[SamplesMetadata]):
    """The windows that show what each latent is about."""

    name = "samples"
    result = SamplesMetadata
    shared = ("tokens", "seed", "prefix")
    # Which rows the windows are of is a setting of samples alone; the pages show whichever were made.
    apart = ("prefix",)

    def split(self, config: EvaluateConfig) -> Literal["val", "train"]:
        """Of its own section."""
        return config.samples.split

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:  # noqa: ARG002
        """There must be rows."""
        check_rows(shards, config.samples.split)

    def make(self, job: Job) -> SamplesMetadata:
        """One pass, which keeps the best windows; then the choice among them."""
        settings, split = job.config.samples, job.shards.split(job.config.samples.split)
        sampling = _pass(job.transcoder_on_device(), split, job)
        rows = sample_rows(sampling, settings.per_decile, settings.random)
        text = window_tokens(split, sampling.shape, rows.place, job.shards.ctx_len)
        write_samples(job.saved.folder, sampling, rows, text)
        return SamplesMetadata(
            **job.facts,
            split=settings.split,
            tokenizer=tokenizer_name(job.shards),
            n_rows=sampling.n_rows,
            n_windows=len(rows.latent),
        )

    def tables(self, results: Sequence[SamplesMetadata]) -> list[ResultTable]:  # noqa: ARG002 -- too long to be printed
        """None: `evaluate show` prints one latent."""
        return []

    def notes(self, result: SamplesMetadata) -> list[str]:
        """How many, and of which rows."""
        made = f"{result.n_windows:,} windows from {result.n_rows:,} {result.split} rows"
        if result.split == "train":
            made += ", which the transcoder has seen: they may show what it memorised"
        return [made]


def find_samples(run: Path, shards: str | None = None) -> Path:
    """The folder samples/ of a run; of the shard set named `shards` when the run has samples of several.

    Raises UserError when there is none, or no single one.
    """
    checkpoint = find_checkpoint(run)
    found = sorted(path.parent for path in (checkpoint.run / "eval").glob(f"*/{SAMPLES_FOLDER}/{METADATA_FILE}"))
    if shards is not None:
        found = [folder for folder in found if folder.parent.name.rpartition("-")[0] == Path(shards).resolve().name]
    if not found:
        raise UserError(f"{run} has no samples yet; make them with: evaluate samples {run}")
    if len(found) > 1:
        names = ", ".join(folder.parent.name for folder in found)
        raise UserError(f"{run} has samples of several shard sets ({names}); choose one with --shards")
    metadata = SamplesMetadata.read(found[0].parent)
    if metadata is None:
        raise UserError(f"{found[0]} was written by another version; run evaluate samples again")
    if metadata.transcoder.sha256 != checkpoint.sha256:
        raise UserError(
            f"{found[0]} shows step {metadata.transcoder.step}, and the newest checkpoint of {run} is step "
            f"{checkpoint.step}; run evaluate samples again"
        )
    return found[0]


def _pass(transcoder: Transcoder, split: Split, job: Job) -> Sampling:
    settings = job.config.samples
    choice = Choice(
        n_top=settings.top,
        # Twice what is shown, so that a tenth whose windows are among the top ones too is not left empty.
        n_sampled=_SAMPLED_PER_KEPT * N_DECILES * settings.per_decile,
        shape=WindowShape(settings.before, settings.after),
        seed=job.config.seed,
    )
    n_contexts, n_rows = count_contexts(split, job.config.tokens)
    sampling = Sampling(transcoder, job.shards, split, choice)
    job.progress.started(job.name, n_rows)
    job.progress.advanced(job.saved.load(sampling))
    for block in context_blocks(job.shards, split, choice.shape, n_contexts, sampling.n_contexts):
        before = sampling.n_rows
        sampling.add(block)
        job.progress.advanced(sampling.n_rows - before)
        job.saved.save_when_due(sampling, sampling.n_rows)
    assert sampling.n_rows == n_rows
    return sampling
