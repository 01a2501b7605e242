"""What other commands may have measured beside report.json, and which command makes what is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka.transcoder import Transcoder

from ..compare import COMPARISON_FILE
from ..contenders import Contender
from .relations import CLUSTERS_FILE

COMMANDS = {
    "hierarchy": "evaluate hierarchy RUN",
    "logits": "evaluate logits RUN",
    "faithfulness": "evaluate faithfulness RUN",
    "absorption": "evaluate absorption RUN",
    "probing": "evaluate probing RUN",
    "ablations": "evaluate ablate RUN LATENT",
    "comparison": "evaluate compare RUN OTHER --out RUN/eval/SET",
}
"""Part -> the command that makes it, as a page shows it."""
_RECORDS = {
    "hierarchy": ("hierarchy.json", "hierarchy.parquet", "cofiring.parquet"),
    "logits": ("logits.json", "logits.parquet"),
    "faithfulness": ("faithfulness.json",),
    "absorption": ("absorption.json",),
    "probing": ("probing.json",),
}
"""Part -> its JSON file, and the tables beside it without which it is not there."""
ABLATIONS_FOLDER = "ablations"


@dataclass(frozen=True, slots=True)
class Parts:
    """What lies in one evaluation folder and belongs to the weights that the pages are about."""

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
    for name, (file, *tables) in _RECORDS.items():
        content = _record(folder / file)
        if content is None or not all((folder / table).is_file() for table in tables):
            continue
        if weights_of(content) == sha256:
            records[name] = content
        else:
            stale.append(name)
    ablations = {}
    for path in sorted((folder / ABLATIONS_FOLDER).glob("*.json")):
        content = _record(path)
        # The page speaks of a latent that is taken out; `ablate --scale` may have measured something else.
        taken_out = content is not None and content.get("scale") == 0
        if content is not None and taken_out and path.stem.isdecimal() and weights_of(content) == sha256:
            ablations[int(path.stem)] = content
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
    return {Contender("", prefix).digest() for prefix in prefixes}


def weights_of(content: dict[str, Any]) -> str | None:
    """sha256 of the weights that a result file says it is of."""
    facts = content.get("transcoder")
    return facts.get("sha256") if isinstance(facts, dict) else None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format_version") == 1 else None
