"""`evaluate report`: from what a run and its evaluation left on the disk to one folder of pages.

index.html assets/                     the pages; they read the data by script tags, since fetch() is blocked on file://
pages.json                             the metadata: of which weights and which shard set the pages are
data/overview.js latents.js            the report, the curves of training; one column an array for all latents
data/hierarchy.js groups.js clusters.js logits.js    where measured: the nest, what groups add, the map, the tokens
data/notes.js                          own notes and stars, as they were then
data/chunk-N.js                        windows of CHUNK_LATENTS latents
data/fires-N.js text-N.js              what is searched: the latents that fire on a token, the text of all windows
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from matryoshka.checkpoints import Checkpoint, find_checkpoint
from matryoshka.config import Config
from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.transcoder import Transcoder

from ..analyses.logits.logits import LOGITS_FILE, LogitTokens
from ..analyses.reconstruction.result import LATENTS_FILE, Report
from ..analyses.reconstruction.run import RunAnalysis
from ..analyses.samples.files import SAMPLES_FOLDER, SamplesMetadata, all_windows, read_histograms
from ..analyses.samples.samples import SamplesAnalysis, find_samples
from ..analysis import Progress, Silent, answer
from ..config import EvaluateConfig
from ..result import ShardSetFacts, TranscoderFacts
from ..rows.token_text import token_text, visible
from ..subject.shard_set import open_shards
from .chunks import ChunkWriter
from .data_file import write_data
from .directions import nearest_directions
from .group_gains import group_gains
from .logit_tokens import logit_table
from .matches import Matches
from .notes import Notes
from .overview import overview
from .page_set import INDEX_FILE, RUN_PAGES, write_pages
from .parts import COMMANDS, Parts, compared_digests, find_parts
from .relations import Relations
from .search_files import write_search
from .window_search import WindowIndex

REPORT_FOLDER = "report"
PAGES_FILE = "pages.json"


class PagesMetadata(Config):
    """The content of pages.json."""

    format_version: Literal[3] = 3
    transcoder: TranscoderFacts
    shard_set: ShardSetFacts


@dataclass(frozen=True, slots=True)
class Pages:
    """The folder that was written, and notes to print about it."""

    index: Path
    notes: tuple[str, ...]


def make_report(
    run: Path, config: EvaluateConfig, *, tokenizer: str | None = None, progress: Progress | None = None
) -> Pages:
    """Write RUN/eval/<set>-<digest>/report/, anew each time; equal inputs give equal bytes.

    The evaluation and the samples are made first where they are missing, on `config.shards` or the set that the run was
    trained on; where they are there and no set is named, none is needed. What other commands measured (see `COMMANDS`)
    is read from its folder. Raises UserError for invalid input.
    """
    progress = progress or Silent()
    # The numbers are always of held-out rows; which rows the windows are of is a setting of the samples.
    config = config.model_copy(update={"split": "val"})
    checkpoint = find_checkpoint(run)
    if config.shards is None and not _is_measured(checkpoint, config):
        config = config.model_copy(update={"shards": open_shards(checkpoint, None, progress.noted).path})
    if config.shards is not None:
        answer(RunAnalysis(), [run], config, progress)
        samples = answer(SamplesAnalysis(), [run], config, progress)[0].path.parent
    else:
        samples = samples_folder(run, config)
    metadata, report = SamplesMetadata.read(samples.parent), Report.read(samples.parent)
    assert metadata is not None
    if report is None:
        raise UserError(f"{samples.parent} has no {Report.FILE} yet; run: evaluate run {run}")
    if report.transcoder.sha256 != metadata.transcoder.sha256:
        raise UserError(f"{samples.parent / Report.FILE} is of other weights than the samples; run evaluate run again")
    folder = samples.parent / REPORT_FOLDER
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    notes: list[str] = []
    texts = _texts(metadata, near_place(config, samples), tokenizer, notes)
    transcoder = Transcoder.load(checkpoint.folder)
    n_groups = len(metadata.transcoder.config["group_sizes"])
    if n_groups < len(transcoder.config.group_sizes):
        transcoder = transcoder.prefix(n_groups)
    digests = cache(lambda: compared_digests(transcoder))
    parts = find_parts(samples.parent, metadata.transcoder.sha256, digests)
    matches = Matches.near(checkpoint.run, samples.parent, digests, transcoder.config.d_sae)
    notes += [f"{folder} has matches that cannot be read; make them again: evaluate match" for folder in matches.unread]
    notes += [f"{name} is of other weights and was left out; make it again: {COMMANDS[name]}" for name in parts.stale]
    search = write_search(partial / "data", WindowIndex.read(samples, texts))
    write_data(partial / "data", "overview", overview(checkpoint, report, metadata, parts, matches, search))
    write_data(partial / "data", "notes", _own_notes(checkpoint.run, transcoder.config.d_sae, notes))
    progress.started(f"{checkpoint.name} pages", transcoder.config.d_sae)
    _write_latents(partial / "data", samples, transcoder, parts, matches, texts, progress)
    write_pages(partial, checkpoint.name, RUN_PAGES)
    publish_json(
        partial / PAGES_FILE, PagesMetadata(transcoder=metadata.transcoder, shard_set=metadata.shard_set).model_dump()
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return Pages(folder / INDEX_FILE, tuple(notes))


def _own_notes(run: Path, d_sae: int, notes: list[str]) -> dict[str, Any]:
    """Own notes and stars; a file of them that cannot be read gives a note; the pages are made all the same."""
    try:
        return Notes(run, d_sae).shown()
    except UserError as error:
        notes.append(str(error))
        return {}


def _is_measured(checkpoint: Checkpoint, config: EvaluateConfig) -> bool:
    """Whether the numbers and the samples of these weights are there, of some shard set or several."""
    for folder in [config.out] if config.out is not None else (checkpoint.run / "eval").glob("*"):
        found = Report.read(folder), SamplesMetadata.read(folder)
        if all(one is not None and one.transcoder.sha256 == checkpoint.sha256 for one in found):
            return True
    return False


def samples_folder(run: Path, config: EvaluateConfig) -> Path:
    """The samples that the pages of `run` are made from. Raises UserError when there are none."""
    if config.out is None:
        return find_samples(run, None if config.shards is None else str(config.shards))
    if SamplesMetadata.read(config.out) is None:
        raise UserError(f"{config.out} has no samples yet; make them with: evaluate samples {run}")
    return config.out / SAMPLES_FOLDER


def near_place(config: EvaluateConfig, samples: Path) -> Path:
    """Where a tokenizer of a relative name is looked for: around the shard set when it is a folder, else the run."""
    return config.shards if isinstance(config.shards, Path) else samples


def read_pages_metadata(folder: Path) -> PagesMetadata | None:
    """The metadata of a folder of pages; None when there is none that this version can read."""
    try:
        return PagesMetadata.model_validate_json((folder / PAGES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def _texts(metadata: SamplesMetadata, near: Path, tokenizer: str | None, notes: list[str]) -> Callable[[int], str]:
    text = token_text(metadata.tokenizer, metadata.shard_set.model_revision, near, tokenizer, notes.append)
    return cache(lambda token: visible(text(token)))


def _write_latents(
    data: Path,
    samples: Path,
    transcoder: Transcoder,
    parts: Parts,
    matches: Matches,
    texts: Callable[[int], str],
    progress: Progress,
) -> None:
    d_sae = transcoder.config.d_sae
    hierarchy = parts.records.get("hierarchy")
    relations = None
    if hierarchy is not None:
        relations = Relations(samples.parent, d_sae, with_clusters=parts.has_map())
    logits = LogitTokens(samples.parent / LOGITS_FILE, d_sae) if "logits" in parts.records else None
    writer = ChunkWriter(
        data,
        read_histograms(samples),
        nearest_directions(transcoder.W_dec),
        texts,
        relations=relations,
        logits=logits,
        ablations=parts.ablations,
        matches=matches,
    )
    for windows in all_windows(samples):
        progress.advanced(writer.add(windows))
    write_data(data, "latents", _table(samples.parent / LATENTS_FILE, writer.finish()))
    found = {
        "hierarchy": relations and relations.tree(),
        "groups": hierarchy and group_gains(hierarchy, texts),
        "clusters": relations and relations.map(),
        "logits": logits and logit_table(logits, texts),
    }
    for name, content in found.items():
        if content is not None:
            write_data(data, name, content)


def largest_acts(folder: Path) -> list[float]:
    """The largest activation of each latent on the rows that report.json in `folder` is of; 0 where it never fires."""
    import pyarrow.parquet as pq

    found = pq.read_table(folder / LATENTS_FILE, columns=["max_act"])["max_act"].to_pylist()
    return [act or 0.0 for act in found]


def _table(path: Path, words: list[str]) -> dict[str, Any]:
    import pyarrow.parquet as pq

    columns = pq.read_table(path, columns=["density", "max_act", "mean_act", "max_cosine"]).to_pydict()
    short = {
        name: [None if v is None or v != v else float(f"{v:.5g}") for v in values] for name, values in columns.items()
    }
    return {
        "density": short["density"],
        "max": short["max_act"],
        "mean": short["mean_act"],
        "cosine": short["max_cosine"],
        "words": words,
    }
