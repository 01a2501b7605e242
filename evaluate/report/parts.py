"""What other commands may have measured beside report.json, and which command makes what is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka.transcoder import Transcoder

from ..analyses import ANALYSES, load_analysis
from ..analyses.ablate.result import ABLATIONS_FOLDER, Ablation
from ..analyses.compare.compare import COMPARISON_FILE
from ..subject.subjects import Subject
from .relations import CLUSTERS_FILE

PARTS = tuple(entry.name for entry in ANALYSES if entry.name not in ("run", "samples", "ablate"))
"""Those that a page can be without: each is made of a report and samples, and `ablate` has a file a latent."""
COMMANDS = {
    **{name: f"evaluate {name} RUN" for name in PARTS},
    "ablations": "evaluate ablate RUN LATENT",
    "comparison": "evaluate compare RUN OTHER --out RUN/eval/SET",
}
"""Part -> the command that makes it, as a page shows it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What is in one evaluation folder and belongs to the weights that the pages are about."""

    folder: Path
    records: dict[str, dict[str, Any]]
    """Part -> the content of its JSON file."""
    comparison: dict[str, Any] | None
    ablations: dict[int, dict[str, Any]]
    """Latent -> what zeroing it does."""
    stale: tuple[str, ...] = field(default=())
    """Parts that are there and were made from other weights; they are left out."""

    def has_map(self) -> bool:
        """Whether the hierarchy came with clusters; a table without that is an older one's."""
        made = self.records.get("hierarchy", {}).get("clusters") is not None
        return made and (self.folder / CLUSTERS_FILE).is_file()

    def missing(self) -> dict[str, str]:
        """Part -> the command that makes it."""
        there = {
            *self.records,
            *(["comparison"] if self.comparison else []),
            *(["ablations"] if self.ablations else []),
        }
        return {name: command for name, command in COMMANDS.items() if name not in there}


def find_parts(folder: Path, sha256: str, compared: Callable[[], set[str]] | None = None) -> Parts:
    """Read what is in `folder`; a file of other weights than `sha256`, or one that cannot be read, is not taken.

    `compared` gives the digests by which a comparison may name the weights; without it any comparison is taken.
    """
    records, stale = {}, []
    for name in PARTS:
        content = load_analysis(name).result.read(folder)
        if content is None:
            continue
        if content.transcoder.sha256 == sha256:
            records[name] = content.model_dump(mode="json")
        else:
            stale.append(name)
    ablations = {}
    for path in sorted((folder / ABLATIONS_FOLDER).glob("*.json")):
        found = Ablation.read(folder, f"{ABLATIONS_FOLDER}/{path.name}")
        # The page shows a latent that is set to 0; `ablate --scale` may have measured something else.
        if found is not None and found.scale == 0 and found.transcoder.sha256 == sha256:
            ablations[found.latent] = found.model_dump(mode="json")
    comparison = _record(folder / COMPARISON_FILE)
    if comparison is not None and compared is not None:
        digests = compared()
        if not any(entry.get("weights_sha256") in digests for entry in comparison.get("entries", [])):
            comparison = None
            stale.append("comparison")
    return Parts(folder, records, comparison, ablations, tuple(stale))


def compared_digests(transcoder: Transcoder) -> set[str]:
    """How `evaluate compare` names these weights and each of their nested prefixes."""
    n_groups = len(transcoder.config.group_sizes)
    prefixes = [transcoder, *(transcoder.prefix(i) for i in range(1, n_groups))]
    return {Subject("", prefix).digest() for prefix in prefixes}


def _record(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format_version") == 1 else None
