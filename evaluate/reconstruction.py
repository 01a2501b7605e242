"""How well each nested prefix reconstructs the target: FVU, L0, cosine, norm ratio. Sums over rows, divided once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka.metrics import CosineSums, FvuSums, L0Sums, NormRatioSums
from matryoshka.transcoder import Transcoder

from .active import nested_reconstructions
from .report_file import PrefixNumbers, finite


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
    y_norm = y.norm(dim=1)
    sq_err, cosine, y_hat_norm = [], [], []
    for y_hat in nested_reconstructions(base, per_group):
        sq_err.append((y_hat - y).square().sum(1))
        y_hat_norm.append(y_hat.norm(dim=1))
        lengths = y_norm * y_hat_norm[-1]
        cosine.append(torch.where(lengths > 0, (y * y_hat).sum(1) / lengths, 0.0))
    return RowErrors(
        sq_err=torch.stack(sq_err),
        cosine=torch.stack(cosine),
        y_hat_norm=torch.stack(y_hat_norm),
        y_norm=y_norm,
        l0=counts.cumsum(1).T,
    )


@dataclass
class ReconstructionSums:
    """The sums behind one table of prefixes."""

    fvu: FvuSums = field(default_factory=FvuSums)
    l0: L0Sums = field(default_factory=L0Sums)
    cosine: CosineSums = field(default_factory=CosineSums)
    norm_ratio: NormRatioSums = field(default_factory=NormRatioSums)

    def add(self, y: Tensor, errors: RowErrors) -> None:
        """Add a batch with targets `y` [rows, d_out]."""
        # MPS has no float64, and the sums are in float64.
        home = torch.device("cpu") if y.device.type == "mps" else y.device
        self.fvu.add(y.to(home), errors.sq_err.to(home))
        self.l0.add(errors.l0.to(home))
        self.cosine.add(errors.cosine.to(home))
        self.norm_ratio.add(errors.y_norm.to(home), errors.y_hat_norm.to(home))

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
