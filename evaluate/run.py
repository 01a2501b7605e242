"""One evaluation: held-out rows through the transcoder, sums of every metric, one report. No language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .analysis import Progress, Silent, load_transcoder
from .checkpoint import Checkpoint, expand_fleets, find_checkpoint
from .config import EvaluateConfig
from .latent_table import LATENTS_FILE, write_latents
from .latents import LOG10_DENSITY_EDGES, group_latents, latent_range
from .measure import Measurement
from .redundancy import Neighbours, decoder_neighbours
from .report_file import REPORT_FILE, Report, read_report, write_report
from .result import ShardSetFacts, TranscoderFacts, already_answered, identity_of, result_folder
from .resume import Unfinished, unfinished
from .rows import count_rows, row_batches


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A report and how it came about."""

    checkpoint: Checkpoint
    path: Path
    """The report.json."""
    report: Report
    is_new: bool
    """False when the report was there already."""
    replaced: tuple[str, ...] = ()
    """How an older report in the same place differed."""
    n_resumed: int = 0
    """Rows that an earlier command, which was stopped, had measured already."""


def evaluate(runs: list[Path], config: EvaluateConfig, progress: Progress | None = None) -> list[Evaluation]:
    """Evaluate each of `runs` on the rows of `config.shards`, by default the val ones, and publish its report.

    A report that already answers for the same weights, rows and settings is only read; a pass that was stopped goes on
    from its last saved state. Raises UserError for whatever
    the user can mend, before the first pass where it can be told.
    """
    progress = progress or Silent()
    if config.shards is None:
        raise UserError("no shard set was named; pass --shards, for example --shards data/l17")
    if not runs:
        raise UserError("no run was named; give one or more, for example data/runs/l17-k96")
    shards = ShardSet.open(config.shards)
    if count_rows(shards, config.split) == 0:
        raise UserError(f"the {config.split} split of {shards.path} holds only special tokens; harvest more text")
    checkpoints = [find_checkpoint(run) for run in expand_fleets(runs)]
    folders = _folders(checkpoints, shards, config)
    return [
        evaluate_checkpoint(checkpoint, shards, config, folder, progress)
        for checkpoint, folder in zip(checkpoints, folders, strict=True)
    ]


def evaluate_checkpoint(
    checkpoint: Checkpoint, shards: ShardSet, config: EvaluateConfig, folder: Path, progress: Progress
) -> Evaluation:
    """Make the report of one checkpoint in `folder`, or read the one that is there."""
    transcoder = load_transcoder(checkpoint, shards, config)
    identity = identity_of(checkpoint, shards, config.content())
    existing, changes = already_answered(read_report(folder), identity)
    if existing is not None and (folder / LATENTS_FILE).is_file():
        return Evaluation(checkpoint, folder / REPORT_FILE, existing, is_new=False)
    with unfinished(folder / REPORT_FILE, identity, config.save_minutes) as saved:
        transcoder = transcoder.to(resolve_device(config.device))
        sums = measure(transcoder, checkpoint.name, shards, config, progress, saved)
        neighbours = decoder_neighbours(transcoder.W_dec)
        report = _report(transcoder, checkpoint, shards, config, sums, neighbours)
        # The report last: where it is, its table is too.
        write_latents(folder, transcoder, sums.latents, neighbours)
        path = write_report(folder, report)
    return Evaluation(checkpoint, path, report, is_new=True, replaced=changes, n_resumed=saved.n_resumed)


def measure(
    transcoder: Transcoder,
    name: str,
    shards: ShardSet,
    config: EvaluateConfig,
    progress: Progress,
    saved: Unfinished | None = None,
) -> Measurement:
    """One pass over the rows, from where `saved` says that it stood."""
    # A prefix was trained with the k of the whole: alone it has none.
    sums = Measurement(transcoder, shards, config, with_topk=config.prefix is None)
    n_rows = count_rows(shards, config.split, config.tokens)
    progress.started(name, n_rows)
    n_done = 0 if saved is None else saved.load(sums)
    progress.advanced(n_done)
    for batch in row_batches(shards.split(config.split), config.batch_rows, config.tokens, n_done):
        sums.add(batch)
        progress.advanced(len(batch))
        if saved is not None:
            saved.save_when_due(sums, sums.n_rows)
    assert sums.n_rows == n_rows
    return sums


def _report(
    transcoder: Transcoder,
    checkpoint: Checkpoint,
    shards: ShardSet,
    config: EvaluateConfig,
    sums: Measurement,
    neighbours: Neighbours,
) -> Report:
    firing, breakdown = sums.latents.firing, sums.breakdown
    return Report(
        transcoder=TranscoderFacts.of(checkpoint, transcoder),
        shard_set=ShardSetFacts.of(shards, config.split),
        settings=config.content(),
        n_rows=sums.n_rows,
        threshold=sums.threshold.value(transcoder),
        batch_topk=None if sums.batch_topk is None else sums.batch_topk.value(transcoder),
        spread=breakdown.spread(sums.l0_histogram, config.bootstrap, config.seed),
        curve=sums.curve.value(),
        by_position=breakdown.by_position(),
        by_token_frequency=breakdown.by_token_frequency(),
        by_document=breakdown.by_document(),
        groups=group_latents(firing, neighbours, transcoder.config.group_sizes),
        total=latent_range(firing, neighbours, 0, transcoder.config.d_sae),
        log10_density_edges=LOG10_DENSITY_EDGES,
    )


def _folders(checkpoints: list[Checkpoint], shards: ShardSet, config: EvaluateConfig) -> list[Path]:
    """Where each report goes. Raises UserError when two would share a place."""
    if config.out is None:
        folders = [result_folder(checkpoint, shards, config) for checkpoint in checkpoints]
    elif len(checkpoints) == 1:
        folders = [config.out]
    else:
        folders = [config.out / checkpoint.name for checkpoint in checkpoints]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(
            "two of the runs have the same name, so that their reports would overwrite each other in "
            f"{config.out or 'one folder'}; name each run once, and evaluate runs of equal names one at a time"
        )
    return folders
