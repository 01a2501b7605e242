"""One step shared by several ranks, each with its rows of every batch; the result is that of one rank with all rows.

Weights, moments, threshold and counters are the same on every rank at every step: what is added up over ranks is added
up by the same collective for all, and every rank then takes the same update. BatchTopK is that of the whole batch: the
k * B largest of all ranks' activations. Summation order differs from one rank's, so results agree to rounding.

Exchanged in a step: about 1.25 k B activations (on the CPU k B of each rank), and the gradients of all weights once, in
an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from matryoshka.ranks import Rank

from ..step.communicator import Communicator
from ..step.gradients import Gradients
from ..step.nested_loss import NestedLoss
from ..step.sparse_acts import SparseActs
from .collectives import among_largest, gather, smallest_, sum_


class RowsOverRanks(Communicator):
    """This rank's rows of a batch; every rank must take every step, with as many rows."""

    def __init__(self, rank: Rank, d_sae: int) -> None:
        self.row_parts = rank.world
        self._rank, self._d_sae = rank, d_sae
        self._spare = 64

    def sum_over_rows(self, part: Tensor) -> Tensor:
        return sum_(part)

    def smallest(self, part: Tensor) -> Tensor:
        return smallest_(part)

    def is_finite(self, x: Tensor) -> Tensor:
        return sum_((~super().is_finite(x)).float()) == 0

    def total_scatter(self, values: Tensor) -> Tensor:
        mean = sum_(values.sum(0)) / (len(values) * self.row_parts)
        return sum_((values - mean).square().sum())

    def residual_scatter(self, residual: Tensor) -> Tensor:
        # The loss of a rank is the mean over its rows, and the whole's is the mean over ranks.
        return self.total_scatter(residual.double()).float() / self.row_parts

    def largest(self, select: Callable[[int], SparseActs], n: int, batch: int, *, fixed_shapes: bool) -> SparseActs:
        n_all = batch * self._d_sae
        if not fixed_shapes:
            return self._of_all(select(min(n, n_all)), n)
        # Rows are dealt at random, so a rank's part of the n largest is close to its fair one. To know that nobody held
        # back more, the host waits for the device once in a step.
        n_asked = min(n, n * 5 // (4 * self.row_parts) + self._spare, n_all)
        own = select(n_asked)
        offers = gather(own.acts, self._rank)
        if n_asked < n and bool(self._may_hold_more(offers, n)):
            own = select(min(n, n_all))
            offers = gather(own.acts, self._rank)
        return among_largest(own, offers, n, self._rank)

    def _may_hold_more(self, offers: Tensor, n: int) -> Tensor:
        """Whether some rank's smallest offer is among the `n` largest of all `offers` [world, n_asked], so that what it
        did not offer may be too; 0-d bool."""
        least = offers.min(1).values
        nth = offers.view(-1).topk(min(n, offers.numel()), sorted=False).values.min()
        return ((least >= nth) & (least > 0)).any()

    def _of_all(self, kept: SparseActs, n: int) -> SparseActs:
        """The entries of this rank that are among the `n` largest of all ranks.

        Ties go to the lower rank, then to the smallest row * d_sae + latent: the order of the whole batch.
        """
        padded = torch.full((n,), -1.0)
        padded[: len(kept.acts)] = kept.acts
        everyone = gather(padded, self._rank)
        values = everyone.view(-1)
        nth = values.topk(n).values[-1]
        if nth < 0:
            return kept
        above = kept.acts > nth
        ties = (kept.acts == nth).nonzero().squeeze(1)
        n_ties = n - int((values > nth).sum()) - int((everyone[: self._rank.index] == nth).sum())
        flat = kept.rows[ties].long() * self._d_sae + kept.latents[ties]
        above[ties[flat.argsort()[: max(0, n_ties)]]] = True
        return SparseActs(kept.rows[above], kept.latents[above], kept.acts[above])

    def gradients(self, own: Gradients) -> Gradients:
        whole = {name: self._mean_(own.rows(name, 0, self._d_sae)) for name in ("W_enc", "W_dec")}
        nested = NestedLoss(
            loss=self._mean_(own.nested.loss),
            aux_loss=self._mean_(own.nested.aux_loss),
            sq_err=sum_(own.nested.sq_err),
        )
        small = {name: self._mean_(gradient.contiguous()) for name, gradient in sorted(own.small.items())}
        return Gradients(
            nested=nested,
            small=small,
            decoder_dot=self._mean_(own.decoder_dot),
            rows=lambda name, start, end: whole[name][start:end],
            stored=True,
        )

    def _mean_(self, part: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        return sum_(part).div_(self.row_parts)
