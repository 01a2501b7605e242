"""How well each nested prefix reconstructs the target: FVU, L0, cosine, norm ratio. Sums over rows, divided once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka.metrics import CosineSums, FvuSums, L0Sums, NormRatioSums, float64
from matryoshka.transcoder import Transcoder

from ..result import finite
from .activations import nested_reconstructions
from .records import PrefixNumbers

_ROWS_AT_ONCE = 1024
"""Rows that are float64 at once."""


@dataclass(frozen=True, slots=True)
class RowErrors:
    """What the reconstructions of one batch come to, a number per prefix and row."""

    sq_err: Float[Tensor, "n_prefixes rows"]
    """||y - y_hat_i||^2"""
    cosine: Float[Tensor, "n_prefixes rows"]
    """y . y_hat_i / (||y|| ||y_hat_i||); 0 where one of the two is zero"""
    y_hat_norm: Float[Tensor, "n_prefixes rows"]
    y_norm: Float[Tensor, " rows"]
    l0: Tensor
    """[n_prefixes, rows] int64, active latents"""


def row_errors(base: Tensor, per_group: Tensor, counts: Tensor, y: Tensor) -> RowErrors:
    """Measure one batch against its targets `y` [rows, d_out] float32.

    `base` [rows, d_out] is the output without latents, `per_group` [rows, n_groups, d_out] what each group adds and
    `counts` [rows, n_groups] how many of its latents are active.
    """
    y_norm, difference = y.norm(dim=1), torch.empty_like(y)
    sq_err, cosine, y_hat_norm = [], [], []
    for y_hat in nested_reconstructions(base, per_group):
        length = y_hat.norm(dim=1)
        sq_err.append(torch.sub(y_hat, y, out=difference).norm(dim=1).square())
        y_hat_norm.append(length)
        # y . y_hat from the three lengths: nothing is read again for it.
        product = (y_norm.square() + length.square() - sq_err[-1]) / 2
        lengths = y_norm * length
        cosine.append(torch.where(lengths > 0, product / lengths, 0.0).clamp(-1, 1))
    return RowErrors(
        sq_err=torch.stack(sq_err),
        cosine=torch.stack(cosine),
        y_hat_norm=torch.stack(y_hat_norm),
        y_norm=y_norm,
        l0=counts.cumsum(1).T,
    )


def joined(parts: list[RowErrors]) -> RowErrors:
    """The errors of several parts of a batch as those of the whole."""
    columns = {f.name: torch.cat([getattr(part, f.name) for part in parts], -1) for f in fields(RowErrors)}
    return RowErrors(**columns)


def replaced(errors: RowErrors, rows: Tensor, new: RowErrors) -> RowErrors:
    """`errors` with those of `rows` [n] int64 replaced by `new`; the given ones stay as they are."""
    columns = {f.name: getattr(errors, f.name).index_copy(-1, rows, getattr(new, f.name)) for f in fields(RowErrors)}
    return RowErrors(**columns)


@dataclass(frozen=True, slots=True)
class TargetMoments:
    """What every FVU of a batch needs of its targets."""

    n_rows: int
    sum_y: Tensor
    """[d_out] float64"""
    sum_y_sq: float

    @classmethod
    def of(cls, y: Float[Tensor, "rows d_out"]) -> TargetMoments:
        """Summed in float64."""
        # MPS has no float64, and the sums are in float64.
        sum_y, sum_y_sq = torch.zeros(y.shape[1], dtype=torch.float64), 0.0
        for part in y.split(_ROWS_AT_ONCE):
            wide = float64(part)
            sum_y += wide.sum(0).cpu()
            sum_y_sq += float(wide.square_().sum())
        return cls(len(y), sum_y, sum_y_sq)

    def fvu(self, sq_err: Float[Tensor, "n_prefixes rows"]) -> FvuSums:
        """The sums of this batch alone."""
        return FvuSums(self.n_rows, float64(sq_err).sum(1).cpu(), self.sum_y, self.sum_y_sq)


@dataclass
class ReconstructionSums:
    """The sums behind one table of prefixes."""

    fvu: FvuSums = field(default_factory=FvuSums)
    l0: L0Sums = field(default_factory=L0Sums)
    cosine: CosineSums = field(default_factory=CosineSums)
    norm_ratio: NormRatioSums = field(default_factory=NormRatioSums)

    def add(self, y: Tensor, errors: RowErrors) -> None:
        """Add a batch with targets `y` [rows, d_out]."""
        self.add_moments(TargetMoments.of(y), errors)

    def add_moments(self, moments: TargetMoments, errors: RowErrors) -> None:
        """Add a batch whose targets are summed up already."""
        self.fvu.merge(moments.fvu(errors.sq_err))
        self.l0.add(errors.l0)
        self.cosine.add(errors.cosine)
        self.norm_ratio.add(errors.y_norm, errors.y_hat_norm)

    def value(self, transcoder: Transcoder) -> tuple[PrefixNumbers, ...]:
        """The table, one entry a prefix."""
        return tuple(
            PrefixNumbers(
                group_size=size,
                prefix_end=end,
                fvu=finite(fvu),
                l0=l0,
                cosine=cosine,
                norm_ratio=finite(norm_ratio),
            )
            for size, end, fvu, l0, cosine, norm_ratio in zip(
                transcoder.config.group_sizes,
                transcoder.prefix_ends,
                self.fvu.value(),
                self.l0.value(),
                self.cosine.value(),
                self.norm_ratio.value(),
                strict=True,
            )
        )
