"""report.json: its schema."""

from __future__ import annotations

from matryoshka.config import Config

from .result import Result

LATENTS_FILE = "latents.parquet"
"""A row a latent; see latent_table.py."""


class PrefixNumbers(Config):
    """One nested prefix; a number is null where it is not defined, such as an FVU of targets that do not vary."""

    group_size: int
    prefix_end: int
    fvu: float | None
    """sum ||y - y_hat||^2 / sum ||y - mean(y)||^2 over all rows"""
    l0: float
    """mean number of active latents in a row"""
    cosine: float
    """mean of cos(y, y_hat)"""
    norm_ratio: float | None
    """sum ||y_hat|| / sum ||y||"""


class L0Spread(Config):
    """How the L0 of single rows and the uncertainty of the means spread; one entry a prefix."""

    quantile_levels: tuple[float, ...]
    l0_quantiles: tuple[tuple[int, ...], ...]
    """active latents of a row, at each level"""
    fvu_interval: tuple[tuple[float, float], ...] | None
    """95% bootstrap interval of FVU over documents; null with a single document"""
    l0_interval: tuple[tuple[float, float], ...] | None


class CurvePoint(Config):
    """All thresholds times one factor; one entry a prefix."""

    threshold_scale: float
    l0: tuple[float, ...]
    fvu: tuple[float | None, ...]


class Stratum(Config):
    """A part of the rows."""

    name: str
    n_rows: int
    share_of_variance: float | None
    """of sum ||y - mean(y)||^2, the mean over all rows"""
    fvu: tuple[float | None, ...]
    """of each prefix, over that part of the variance; the total FVU is the average weighted by it"""
    l0: tuple[float | None, ...]


class DocumentSpread(Config):
    """FVU of single documents, one entry a prefix."""

    n_documents: int
    """with at least min_rows evaluated rows"""
    min_rows: int
    quantile_levels: tuple[float, ...]
    fvu_quantiles: tuple[tuple[float, ...], ...] | None


class GroupLatents(Config):
    """How a range of latents is used."""

    n_latents: int
    n_dead: int
    """fired on no evaluated row"""
    dead_share: float
    dense_share: float
    """share that fires on more than a tenth of the rows"""
    mean_max_cosine: float | None
    """decoder redundancy: mean over latents of the largest cosine with another decoder row of the transcoder"""
    redundant_share: float | None
    """share whose decoder row has a cosine above 0.9 with another one"""
    log10_density_counts: tuple[int, ...]
    """latents that fired, by log10 of the share of rows they fire on; edges in Report.log10_density_edges"""


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
