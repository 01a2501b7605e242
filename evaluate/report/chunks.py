"""The data files of the latent pages: windows and relations in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..analyses.logits.logits import LogitTokens
from ..analyses.samples.files import Histogram, Window
from .ablation import ablation_facts
from .data_file import write_data
from .matches import Matches
from .relations import Relations
from .window_search import BLANK

CHUNK_LATENTS = 32
WORDS = 6
WINDOW_FIELDS = ("kind", "decile", "rank", "context", "position", "doc", "peak", "act", "tokens", "acts")
"""`acts` is index, activation, index, activation, ... of the tokens on which the latent fires."""


class ChunkWriter:
    """Writes chunk-N.js as windows come, in the order of the latents."""

    def __init__(
        self,
        folder: Path,
        histograms: list[Histogram],
        near: list[list[tuple[int, float]]],
        text_of: Callable[[int], str],
        *,
        relations: Relations | None = None,
        logits: LogitTokens | None = None,
        ablations: Mapping[int, dict[str, Any]] | None = None,
        matches: Matches | None = None,
    ) -> None:
        self._folder, self._histograms, self._near = folder, histograms, near
        self._relations, self._logits, self._ablations = relations, logits, ablations or {}
        self._matches = matches or Matches([])
        self._text_of = text_of
        self._words: list[str] = []
        self._chunk: list[dict[str, Any]] = []
        self._strings: dict[str, int] = {}

    def add(self, windows: list[Window]) -> int:
        """Take the windows of the next latents; returns how many latents were written."""
        before = len(self._words)
        for latent, own in itertools.groupby(windows, key=lambda window: window.latent):
            # Latents without a single window, such as in a set without silent contexts, come as empty ones.
            while len(self._words) < latent:
                self._latent([])
            self._latent(list(own))
        return len(self._words) - before

    def finish(self) -> list[str]:
        """Write what is left; returns for each latent the tokens it fires on most."""
        while len(self._words) < len(self._histograms):
            self._latent([])
        self._flush_chunk()
        return self._words

    def _latent(self, windows: list[Window]) -> None:
        latent = len(self._words)
        histogram = self._histograms[latent]
        counts = histogram.counts
        while counts and counts[-1] == 0:
            counts = counts[:-1]
        self._chunk.append(
            {
                "n": histogram.n_rows,
                "width": histogram.width,
                "counts": counts,
                "near": self._near[latent],
                "windows": [self._window(window) for window in windows],
                **self._measured(latent),
            }
        )
        top = [window for window in windows if window.kind == "top"]
        peaks = dict.fromkeys(self._text_of(window.tokens[window.peak]).strip() or BLANK for window in top)
        self._words.append("  ".join(list(peaks)[:WORDS]))
        if len(self._words) % CHUNK_LATENTS == 0:
            self._flush_chunk()

    def _measured(self, latent: int) -> dict[str, Any]:
        """What other commands found out about a latent, where they were run."""
        found = {} if self._relations is None else self._relations.of(latent)
        if self._logits is not None:
            raised, lowered = self._logits.of(latent)
            found["raised"], found["lowered"] = self._tokens(raised), self._tokens(lowered)
        if others := self._matches.of(latent):
            found["matches"] = others
        if latent in self._ablations:
            found["ablation"] = ablation_facts(self._ablations[latent], self._text_of)
        return found

    def _tokens(self, pairs: list[tuple[int, float]]) -> list[list[Any]]:
        return [[self._place(token), float(f"{effect:.4g}")] for token, effect in pairs]

    def _place(self, token: int) -> int:
        return self._strings.setdefault(self._text_of(token), len(self._strings))

    def _window(self, window: Window) -> list[Any]:
        """In the order of WINDOW_FIELDS; a list and not an object, which would be half again as large."""
        acts = [x for i, act in enumerate(window.acts) if act > 0 for x in (i, _short(act))]
        tokens = [self._place(token) for token in window.tokens]
        location = [window.context, window.position, window.doc_id, window.peak]
        return [window.kind, window.decile, window.rank, *location, _short(window.act), tokens, acts]

    def _flush_chunk(self) -> None:
        if self._chunk:
            number = (len(self._words) - 1) // CHUNK_LATENTS
            write_data(
                self._folder,
                f"chunk-{number}",
                {"fields": WINDOW_FIELDS, "texts": list(self._strings), "latents": self._chunk},
            )
        self._chunk, self._strings = [], {}


def _short(act: float) -> float:
    return float(f"{act:.7g}")
