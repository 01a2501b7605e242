"""`evaluate samples`: one pass over the val rows, then the windows that show what each latent is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.runs import make_directory
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from .analysis import Progress, Silent, load_transcoder
from .checkpoint import Checkpoint, find_checkpoint
from .config import EvaluateConfig
from .result import ShardSetFacts, TranscoderFacts, already_answered, result_folder
from .resume import Unfinished, unfinished
from .sample_rows import N_DECILES, sample_rows, window_tokens
from .samples_file import MARK_FILE, SAMPLES_FOLDER, SamplesMark, read_mark, write_samples
from .sampling import Choice, Sampling, context_blocks, count_contexts
from .windows import WindowShape

_SAMPLED_PER_KEPT = 2


@dataclass(frozen=True, slots=True)
class Sampled:
    """A folder of samples and how it came about."""

    path: Path
    """The folder samples/."""
    mark: SamplesMark
    is_new: bool
    """False when the samples were there already."""
    replaced: tuple[str, ...] = ()
    """How older samples in the same place differed."""
    n_resumed: int = 0
    """Rows that an earlier command, which was stopped, had seen already."""


def make_samples(run: Path, config: EvaluateConfig, progress: Progress | None = None) -> Sampled:
    """Choose windows for every latent of `run` and publish them in RUN/eval/<set>-<digest>/samples.

    Samples that already answer for the same weights, rows and settings are only read. Raises UserError for whatever the
    user can mend.
    """
    if config.shards is None:
        raise UserError("no shard set was named; pass --shards, for example --shards data/l17")
    shards, checkpoint = ShardSet.open(config.shards), find_checkpoint(run)
    transcoder = load_transcoder(checkpoint, shards, config)
    # Which rows the windows are of is a setting of samples alone, and stands in their mark.
    folder = result_folder(checkpoint, shards, config.model_copy(update={"split": "val"})) / SAMPLES_FOLDER
    identity = _mark(checkpoint, transcoder, shards, config, 0, 0).identity()
    existing, changes = already_answered(read_mark(folder), identity)
    if existing is not None:
        return Sampled(folder, existing, is_new=False)
    make_directory(folder)
    with unfinished(folder / MARK_FILE, identity, config.save_minutes) as saved:
        transcoder = transcoder.to(resolve_device(config.device))
        sampling = _pass(transcoder, checkpoint.name, shards, config, progress or Silent(), saved)
        rows = sample_rows(sampling, config.samples.per_decile, config.samples.random)
        text = window_tokens(shards.split(config.samples.split), sampling.shape, rows.place, shards.ctx_len)
        mark = _mark(checkpoint, transcoder, shards, config, sampling.n_rows, len(rows.latent))
        write_samples(folder, mark, sampling, rows, text)
    return Sampled(folder, mark, is_new=True, replaced=changes, n_resumed=saved.n_resumed)


def find_samples(run: Path, shards: str | None = None) -> Path:
    """The folder samples/ of a run; of the shard set named `shards` when the run has samples of several.

    Raises UserError when there is none, or no single one.
    """
    checkpoint = find_checkpoint(run)
    found = sorted(path.parent for path in (checkpoint.run / "eval").glob(f"*/{SAMPLES_FOLDER}/{MARK_FILE}"))
    if shards is not None:
        found = [folder for folder in found if folder.parent.name.rpartition("-")[0] == Path(shards).resolve().name]
    if not found:
        raise UserError(f"{run} has no samples yet; make them with: evaluate samples {run} --shards DIR")
    if len(found) > 1:
        names = ", ".join(folder.parent.name for folder in found)
        raise UserError(f"{run} has samples of several shard sets ({names}); choose one with --shards")
    mark = read_mark(found[0])
    if mark is None:
        raise UserError(f"{found[0]} was written by another version; run evaluate samples again")
    if mark.transcoder.sha256 != checkpoint.sha256:
        raise UserError(
            f"{found[0]} shows step {mark.transcoder.step}, and the newest checkpoint of {run} is step "
            f"{checkpoint.step}; run evaluate samples again"
        )
    return found[0]


def _pass(
    transcoder: Transcoder,
    name: str,
    shards: ShardSet,
    config: EvaluateConfig,
    progress: Progress,
    saved: Unfinished,
) -> Sampling:
    settings = config.samples
    choice = Choice(
        n_top=settings.top,
        # Twice what is shown, so that a tenth whose windows are among the top ones too is not left empty.
        n_sampled=_SAMPLED_PER_KEPT * N_DECILES * settings.per_decile,
        shape=WindowShape(settings.before, settings.after),
        seed=config.seed,
    )
    split = shards.split(settings.split)
    n_contexts, n_rows = count_contexts(split, config.tokens)
    sampling = Sampling(transcoder, shards, split, choice)
    progress.started(name, n_rows)
    progress.advanced(saved.load(sampling))
    for block in context_blocks(shards, split, choice.shape, n_contexts, sampling.n_contexts):
        before = sampling.n_rows
        sampling.add(block)
        progress.advanced(sampling.n_rows - before)
        saved.save_when_due(sampling, sampling.n_rows)
    assert sampling.n_rows == n_rows
    return sampling


def _mark(
    checkpoint: Checkpoint,
    transcoder: Transcoder,
    shards: ShardSet,
    config: EvaluateConfig,
    n_rows: int,
    n_windows: int,
) -> SamplesMark:
    tokenizer = shards.manifest.model.get("tokenizer")
    name = tokenizer.get("name") if isinstance(tokenizer, dict) else None
    settings = {
        **config.samples.model_dump(mode="json"),
        "tokens": config.tokens,
        "seed": config.seed,
        "prefix": config.prefix,
    }
    return SamplesMark(
        transcoder=TranscoderFacts.of(checkpoint, transcoder),
        shard_set=ShardSetFacts.of(shards, config.samples.split),
        settings=settings,
        split=config.samples.split,
        tokenizer=str(name or shards.manifest.model.get("model", "")),
        n_rows=n_rows,
        n_windows=n_windows,
    )
