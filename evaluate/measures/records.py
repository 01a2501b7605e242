"""What the measures come to, as results store them."""

from __future__ import annotations

from matryoshka.config import Config


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
