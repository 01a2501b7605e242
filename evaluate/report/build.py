"""`evaluate report`: from what a run and its evaluation left on the disk to one folder of pages.

index.html assets/                     the pages; they read the data by script tags, since fetch() is blocked on file://
data/overview.js latents.js            the report, the curves of training; one column an array for all latents
data/chunk-N.js text-N.js              windows of CHUNK_LATENTS latents; what is searched, of TEXT_LATENTS latents
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.runs import METRICS_FILE, RUN_FILE
from matryoshka.transcoder import Transcoder

from ..checkpoint import Checkpoint, find_checkpoint
from ..config import EvaluateConfig
from ..latent_table import LATENTS_FILE
from ..report_file import REPORT_FILE, Report, read_report
from ..run import Progress, Silent, evaluate
from ..samples import find_samples, make_samples
from ..samples_file import SAMPLES_FOLDER, SamplesMark, all_windows, read_histograms, read_mark
from ..show import token_text
from .chunks import CHUNK_LATENTS, TEXT_LATENTS, ChunkWriter
from .data_file import write_data
from .directions import nearest_directions

REPORT_FOLDER = "report"
INDEX_FILE = "index.html"
SCRIPTS = ("uplot", "page", "charts", "overview", "latents", "latent", "main")
MAX_METRIC_POINTS = 1000


@dataclass(frozen=True, slots=True)
class Pages:
    """The folder that was written, and what a person should be told about it."""

    index: Path
    notes: tuple[str, ...]


def make_report(
    run: Path, config: EvaluateConfig, *, tokenizer: str | None = None, progress: Progress | None = None
) -> Pages:
    """Write RUN/eval/<set>-<digest>/report/, anew each time; equal inputs give equal bytes.

    With `config.shards` the evaluation and the samples are made first where they are missing; without, they must be
    there. Raises UserError for whatever the user can mend.
    """
    progress = progress or Silent()
    if config.shards is not None:
        evaluate([run], config, progress)
        make_samples(run, config, progress)
    samples = _samples_folder(run, config)
    checkpoint, mark, report = find_checkpoint(run), read_mark(samples), read_report(samples.parent)
    assert mark is not None
    if report is None or not (samples.parent / LATENTS_FILE).is_file():
        raise UserError(f"{samples.parent} has no {REPORT_FILE} yet; run: evaluate run {run} --shards DIR")
    if report.transcoder.sha256 != mark.transcoder.sha256:
        raise UserError(f"{samples.parent / REPORT_FILE} is of other weights than the samples; run evaluate run again")
    folder = samples.parent / REPORT_FOLDER
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    notes: list[str] = []
    texts = token_text(mark, samples, tokenizer, notes.append)
    transcoder = Transcoder.load(checkpoint.folder)
    histograms, near = read_histograms(samples), nearest_directions(transcoder.W_dec)
    writer = ChunkWriter(partial / "data", histograms, near, texts)
    progress.started(f"{checkpoint.name} pages", len(histograms))
    for windows in all_windows(samples):
        progress.advanced(writer.add(windows))
    words = writer.finish()
    write_data(partial / "data", "latents", _table(samples.parent / LATENTS_FILE, words))
    write_data(partial / "data", "overview", _overview(checkpoint, report, mark))
    _write_assets(partial, checkpoint.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return Pages(folder / INDEX_FILE, tuple(notes))


def _samples_folder(run: Path, config: EvaluateConfig) -> Path:
    if config.out is None:
        return find_samples(run, None if config.shards is None else str(config.shards))
    if read_mark(config.out / SAMPLES_FOLDER) is None:
        raise UserError(f"{config.out} has no samples yet; make them with: evaluate samples {run} --shards DIR")
    return config.out / SAMPLES_FOLDER


def _overview(checkpoint: Checkpoint, report: Report, mark: SamplesMark) -> dict[str, Any]:
    sizes = report.transcoder.config["group_sizes"]
    n_latents = sum(sizes)
    return {
        "report": report.model_dump(mode="json", exclude={"by_token_frequency", "by_document"}),
        "group_sizes": sizes,
        "prefix_ends": [sum(sizes[: i + 1]) for i in range(len(sizes))],
        "samples": mark.model_dump(mode="json", exclude={"transcoder", "shard_set"}),
        "chunk_latents": CHUNK_LATENTS,
        "text_file_latents": TEXT_LATENTS,
        "n_text_files": -(-n_latents // TEXT_LATENTS),
        "metrics": _metrics(checkpoint.run / METRICS_FILE, sizes),
        "run": _run_facts(checkpoint.run / RUN_FILE),
    }


def _metrics(path: Path, sizes: list[int]) -> dict[str, Any]:
    """Curves of training, at most MAX_METRIC_POINTS points; empty where a run logged none."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                # The last line of a run that was killed while it wrote.
                continue
    lines = [line for line in lines if isinstance(line, dict) and "step" in line]
    lines = lines[:: max(1, -(-len(lines) // MAX_METRIC_POINTS))]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return {
        "step": [line["step"] for line in lines],
        "fvu": [[_rounded(line.get(f"fvu/prefix_{end}")) for line in lines] for end in ends],
        "dead_share": [_rounded(line.get("dead_share")) for line in lines],
    }


def _rounded(value: Any) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, int | float) and abs(value) < float("inf") else None


def _run_facts(path: Path) -> dict[str, Any] | None:
    """config and provenance of run.json; None for bare weights."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {key: content[key] for key in ("config", "provenance") if isinstance(content.get(key), dict)}


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


def _write_assets(folder: Path, title: str) -> None:
    from jinja2 import Environment

    package = resources.files(__package__ or "")
    (folder / "assets").mkdir()
    for asset in sorted(package.joinpath("assets").iterdir(), key=lambda item: item.name):
        (folder / "assets" / asset.name).write_bytes(asset.read_bytes())
    template = Environment(autoescape=True).from_string(package.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    scripts = [f"assets/{name}.js" for name in SCRIPTS]
    (folder / INDEX_FILE).write_text(template.render(title=title, scripts=scripts) + "\n", encoding="utf-8")
