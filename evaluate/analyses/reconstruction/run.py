"""One evaluation: held-out rows through the transcoder, sums of every metric, one report. No language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job, Progress
from ...config import EvaluateConfig
from ...measures.bootstrap import DOCUMENTS
from ...measures.redundancy import Neighbours, decoder_neighbours
from ...resume import ResumablePass
from ...rows.batches import check_rows, count_rows, row_batches
from .latent_table import write_latents
from .latents import LOG10_DENSITY_EDGES, group_latents, latent_range
from .result import Report
from .row_pass import Measurement
from .table import prefix_table, runs_table

UNKNOWN_BATCH = 4096
"""Rows of a batch for weights of which no run.json says how they were trained."""


class RunAnalysis(Analysis[Report]):
    """Every metric of a transcoder that needs no language model."""

    name = "run"
    result = Report

    def settings(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:  # noqa: ARG002
        """It has no section of its own: all that the others share."""
        content = config.content()
        # Batches are those of training: no number here depends on this one.
        del content["batch_rows"]
        return content | DOCUMENTS

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:  # noqa: ARG002
        """There must be rows."""
        check_rows(shards, config.split)

    def make(self, job: Job) -> Report:
        """One pass, and the neighbours of the decoder's rows."""
        transcoder = job.transcoder_on_device()
        batch_rows = job.checkpoint.training_batch or UNKNOWN_BATCH
        sums = measure(transcoder, job.name, job.shards, job.config, batch_rows, job.progress, job.saved)
        neighbours = decoder_neighbours(transcoder.W_dec)
        write_latents(job.saved.folder, transcoder, sums.latents, neighbours)
        return _report(transcoder, job, sums, neighbours)

    def tables(self, results: Sequence[Report]) -> list[ResultTable]:
        """The prefixes of one run, or a line for each of several."""
        return [prefix_table(results[0]) if len(results) == 1 else runs_table(results)]


def measure(
    transcoder: Transcoder,
    name: str,
    shards: ShardSet,
    config: EvaluateConfig,
    batch_rows: int,
    progress: Progress,
    saved: ResumablePass | None = None,
) -> Measurement:
    """One pass over the rows, `batch_rows` at a time, from the row that `saved` reached."""
    # A prefix was trained with the k of the whole: alone it has none.
    sums = Measurement(transcoder, shards, config, with_topk=config.prefix is None)
    n_rows = count_rows(shards, config.split, config.tokens)
    progress.started(name, n_rows)
    n_done = 0 if saved is None else saved.load(sums)
    progress.advanced(n_done)
    for batch in row_batches(shards.split(config.split), batch_rows, config.tokens, n_done):
        sums.add(batch)
        progress.advanced(len(batch))
        if saved is not None:
            saved.save_when_due(sums, sums.n_rows)
    assert sums.n_rows == n_rows
    return sums


def _report(transcoder: Transcoder, job: Job, sums: Measurement, neighbours: Neighbours) -> Report:
    config, firing, breakdown = job.config, sums.latents.firing, sums.breakdown
    return Report(
        **job.facts,
        n_rows=sums.n_rows,
        n_documents=breakdown.n_documents,
        threshold=sums.threshold.value(transcoder),
        batch_topk=None if sums.batch_topk is None else sums.batch_topk.value(transcoder),
        batch_topk_rows=None if sums.batch_topk is None else job.checkpoint.training_batch or UNKNOWN_BATCH,
        batch_topk_as_trained=None if sums.batch_topk is None else job.checkpoint.training_batch is not None,
        spread=breakdown.uncertainty(sums.l0_histogram, config.bootstrap, config.seed),
        curve=sums.curve.value(),
        by_position=breakdown.by_position(),
        by_token_frequency=breakdown.by_token_frequency(),
        by_document=breakdown.by_document(),
        groups=group_latents(firing, neighbours, transcoder.config.group_sizes),
        total=latent_range(firing, neighbours, 0, transcoder.config.d_sae),
        log10_density_edges=LOG10_DENSITY_EDGES,
    )
