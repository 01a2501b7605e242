"""One step shared by several ranks, each with its rows of every batch; the result is that of one rank with all rows.

Weights, moments, threshold and counters are the same on every rank at every step: what is added up over ranks is added
up by the same collective for all, and every rank then takes the same update. BatchTopK is that of the whole batch: the
k * B largest of all ranks' activations. Summation order differs from one rank's, so results agree to rounding.

Exchanged in a step: about 1.25 k B activations (on the CPU k B of each rank), and the gradients of all weights once, in
an all-reduce.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .collectives import among_largest, gather, smallest_, sum_
from .entries import Kept
from .gradients import Gradients
from .nested import NestedLoss
from .ranks import Rank
from .selection import select_fixed_shape
from .step import NonFiniteLoss, StepReport, StepSettings, StepState, TrainStep


class ParallelStep(TrainStep):
    """TrainStep on this rank's rows of a batch; every rank must call it for every batch, with as many rows."""

    def __init__(self, settings: StepSettings, state: StepState, device: torch.device, rank: Rank) -> None:
        super().__init__(settings, state, device)
        self._rank = rank
        # The loss of a rank is the mean over its rows, and the whole's is the mean over ranks.
        self._residual_spread = lambda residual: self._whole_spread(residual.double()).float() / rank.world
        self._spare = 64
        self._whole_is_finite = torch.ones((), dtype=torch.bool)

    def _largest(self, x: Tensor) -> Kept:
        # Asked before anything is: a bad row would stop its own rank alone, and the others would wait for ever.
        self._whole_is_finite = sum_((~torch.isfinite(x.sum())).float()) == 0
        if not self._fixed_shapes and not bool(self._whole_is_finite):
            raise NonFiniteLoss(int(self.state.step), float("nan"))
        state, rank = self.state, self._rank
        n = self.settings.k * x.shape[0] * rank.world
        if not self._fixed_shapes:
            own = self._encoder.select(x, state.W_enc, state.b_enc, min(n, x.shape[0] * state.W_enc.shape[0]))
            return self._of_all(own, n)
        # Rows are dealt at random, so a rank's part of the n largest is close to its fair one. To know that nobody held
        # back more, the host waits for the device once in a step.
        n_asked = min(n, n * 5 // (4 * rank.world) + self._spare, x.shape[0] * state.W_enc.shape[0])
        own = select_fixed_shape(x, state.W_enc, state.b_enc, n_asked, bf16=self.bf16)
        offers = gather(own.acts, rank)
        if n_asked < n and bool(self._may_hold_more(offers, n)):
            own = select_fixed_shape(
                x, state.W_enc, state.b_enc, min(n, x.shape[0] * state.W_enc.shape[0]), bf16=self.bf16
            )
            offers = gather(own.acts, rank)
        return among_largest(own, offers, n, rank)

    def _may_hold_more(self, offers: Tensor, n: int) -> Tensor:
        """Whether some rank's smallest offer is among the `n` largest of all `offers` [world, n_asked], so that what it
        did not offer may be too; 0-d bool."""
        least = offers.min(1).values
        nth = offers.view(-1).topk(min(n, offers.numel()), sorted=False).values.min()
        return ((least >= nth) & (least > 0)).any()

    def _of_all(self, kept: Kept, n: int) -> Kept:
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
        flat = kept.rows[ties].long() * self.state.W_enc.shape[0] + kept.latents[ties]
        above[ties[flat.argsort()[: max(0, n_ties)]]] = True
        return Kept(kept.rows[above], kept.latents[above], kept.acts[above])

    def _is_finite(self, x: Tensor) -> Tensor:  # noqa: ARG002 -- asked of all ranks in _largest
        return self._whole_is_finite

    def _gradients(self, x: Tensor, y: Tensor, kept: Kept, dead: Kept | None, aux_coef: Tensor | float) -> Gradients:
        local = super()._gradients(x, y, kept, dead, aux_coef)
        d_sae = self.state.W_enc.shape[0]
        whole = {name: self._mean_(local.rows(name, 0, d_sae)) for name in ("W_enc", "W_dec")}
        nested = NestedLoss(
            loss=self._mean_(local.nested.loss),
            aux_loss=self._mean_(local.nested.aux_loss),
            sq_err=sum_(local.nested.sq_err),
        )
        small = {name: self._mean_(gradient.contiguous()) for name, gradient in sorted(local.small.items())}
        return Gradients(
            nested=nested,
            small=small,
            decoder_dot=self._mean_(local.decoder_dot),
            rows=lambda name, start, end: whole[name][start:end],
            stored=True,
        )

    def _mean_(self, part: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        return sum_(part).div_(self._rank.world)

    def _whole_spread(self, values: Tensor) -> Tensor:
        """sum over the whole batch of ||v - mean(v)||^2, for this rank's rows `values` [rows, d]."""
        mean = sum_(values.sum(0)) / (len(values) * self._rank.world)
        return sum_((values - mean).square().sum())

    def _times_fired(self, kept: Kept, positive: Tensor) -> Tensor:
        return sum_(super()._times_fired(kept, positive))

    def _smallest(self, acts: Tensor, positive: Tensor) -> Tensor:
        return smallest_(super()._smallest(acts, positive))

    def _count(self, kept: Kept, batch: int, finite: Tensor) -> Tensor:
        return self._mean_(super()._count(kept, batch * self._rank.world, finite).double())

    def _sq_err(self, gradients: Gradients, x: Tensor, y: Tensor, kept: Kept) -> Tensor:
        own = super()._sq_err(gradients, x, y, kept)
        # That of the loss is added up already.
        return own if self.settings.sampled_sizes is None else sum_(own)

    def _report(
        self, gradients: Gradients, norm: Tensor, n_kept: Tensor, sq_err: Tensor, y: Tensor, lr: float
    ) -> StepReport:
        report = super()._report(gradients, norm, n_kept, sq_err, y, lr)
        sq_err = sq_err.double()
        return replace(
            report,
            fvu=tuple((sq_err / self._whole_spread(y.double())).tolist()),
            l2_loss=float(sq_err[-1]) / (len(y) * self._rank.world),
        )
