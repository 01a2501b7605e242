"""overview.js: the numbers of the first page and of the run card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matryoshka.checkpoints import Checkpoint
from matryoshka.run_facts import json_lines, read_run_facts
from matryoshka.runs import METRICS_FILE, RUN_FILE

from ..analyses.reconstruction.result import Report
from ..analyses.samples.files import SamplesMetadata
from .chunks import CHUNK_LATENTS
from .matches import Matches
from .parts import Parts
from .scores import absorption_facts, probing_facts

MAX_METRIC_POINTS = 1000


def overview(
    checkpoint: Checkpoint,
    report: Report,
    metadata: SamplesMetadata,
    parts: Parts,
    matches: Matches,
    search: dict[str, int],
) -> dict[str, Any]:
    """Everything but the latents themselves; `search` is what `write_search` returns about its files."""
    sizes = report.transcoder.config["group_sizes"]
    return {
        "report": report.model_dump(mode="json", exclude={"by_token_frequency", "by_document"}),
        "group_sizes": sizes,
        "prefix_ends": prefix_ends(sizes),
        "samples": metadata.model_dump(mode="json", exclude={"transcoder", "shard_set"}),
        "chunk_latents": CHUNK_LATENTS,
        "search": search,
        "metrics": training_curves(checkpoint.run / METRICS_FILE, sizes),
        "run": run_facts(checkpoint.run / RUN_FILE),
        "used": read_run_facts(checkpoint.run, checkpoint.step).lines() if checkpoint.step is not None else None,
        "comparison": parts.comparison,
        "faithfulness": parts.records.get("faithfulness"),
        "logits": logit_facts(parts.records.get("logits")),
        "absorption": absorption_facts(parts.records.get("absorption")),
        "probing": probing_facts(parts.records.get("probing")),
        "matches": matches.facts(),
        "missing": parts.missing(),
        "stale": list(parts.stale),
        "has_map": parts.has_map(),
    }


def logit_facts(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What turns the effects on the latents' pages into logits; None where they were not measured."""
    return record and {name: record[name] for name in ("scale", "scale_rows", "soft_cap")}


def prefix_ends(sizes: list[int]) -> list[int]:
    """Latents up to and with each group."""
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def training_curves(path: Path, sizes: list[int]) -> dict[str, Any]:
    """Curves of training, at most MAX_METRIC_POINTS points; empty where a run logged none."""
    lines = json_lines(path)
    lines = lines[:: max(1, -(-len(lines) // MAX_METRIC_POINTS))]
    return {
        "step": [line["step"] for line in lines],
        "fvu": [[_rounded(line.get(f"fvu/prefix_{end}")) for line in lines] for end in prefix_ends(sizes)],
        "dead_share": [_rounded(line.get("dead_share")) for line in lines],
    }


def run_facts(path: Path) -> dict[str, Any] | None:
    """config and provenance of run.json; None for bare weights."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {key: content[key] for key in ("config", "provenance") if isinstance(content.get(key), dict)}


def _rounded(value: Any) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, int | float) and abs(value) < float("inf") else None
