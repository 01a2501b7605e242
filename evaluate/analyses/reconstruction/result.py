"""report.json: its schema."""

from __future__ import annotations

from ...measures.records import CurvePoint, DocumentSpread, GroupLatents, L0Spread, PrefixNumbers, Stratum
from ...result import Result

LATENTS_FILE = "latents.parquet"
"""A row a latent; see latent_table.py."""


class Report(Result):
    """The content of report.json; settings are those of all analyses, without what cannot change a number."""

    FILE = "report.json"
    TABLES = (LATENTS_FILE,)

    n_rows: int
    """Rows evaluated: special positions left out; with settings.tokens the first ones, context after context."""
    n_documents: int | None = None
    """Documents that these rows are from, which the intervals draw; null where it was made when contexts were drawn."""
    threshold: tuple[PrefixNumbers, ...]
    """Each prefix with activations cut at the stored threshold, as the transcoder is used."""
    batch_topk: tuple[PrefixNumbers, ...] | None
    """Each prefix with the k x rows largest activations of each batch, as in training; null without a k."""
    batch_topk_rows: int | None = None
    """Rows of such a batch, whatever the settings; the last one of the split may be smaller."""
    batch_topk_as_trained: bool | None = None
    """Whether that is the batch of the run's training; false where nothing tells how the weights were trained. Null,
    as batch_topk_rows, where it was made when it depended on settings.batch_rows."""
    spread: L0Spread
    """Of the threshold mode."""
    curve: tuple[CurvePoint, ...]
    """L0 against FVU with all thresholds moved, sparsest first, over every n-th row in the order of the disk, n the
    smallest that leaves settings.curve_tokens rows or fewer, but at most 16."""
    by_position: tuple[Stratum, ...]
    """By place in the context, in powers of two."""
    by_token_frequency: tuple[Stratum, ...]
    """By the share of the train split's tokens that are this one, in decades."""
    by_document: DocumentSpread
    groups: tuple[GroupLatents, ...]
    """The own latents of each group."""
    total: GroupLatents
    """All latents."""
    log10_density_edges: tuple[float, ...]
