"""One step shared by several ranks, each with its rows of every batch; the result is that of one rank with all rows.

Weights, moments, threshold and counters are the same on every rank at every step: what is added up over ranks is added
up by the same collective for all, and every rank then takes the same update. BatchTopK is that of the whole batch: the
k * B largest of all ranks' activations. Summation order differs from one rank's, so results agree to rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .entries import Kept
from .gradients import Gradients
from .nested import NestedLoss
from .ranks import Rank
from .step import NonFiniteLoss, StepReport, StepSettings, StepState, TrainStep


class ParallelStep(TrainStep):
    """TrainStep on this rank's rows of a batch. On the CPU, through gloo; every rank must call it for every batch."""

    def __init__(self, settings: StepSettings, state: StepState, device: torch.device, rank: Rank) -> None:
        super().__init__(settings, state, device)
        self._rank = rank

    def _select(self, x: Tensor) -> tuple[Kept, Kept | None, Tensor | float]:
        # A row that is not finite would stop its own rank alone, and the others would wait for it for ever.
        n_bad = _sum((~torch.isfinite(x.sum())).float())
        if float(n_bad) > 0:
            raise NonFiniteLoss(int(self.state.step), float("nan"))
        local = self.settings
        n = local.k * x.shape[0] * self._rank.world
        try:
            # The aux entries are each row's own; BatchTopK's are first taken as if this rank held all of the largest.
            self.settings = replace(local, k=min(n // x.shape[0], sum(local.group_sizes)))
            kept, dead, aux_coef = super()._select(x)
        finally:
            self.settings = local
        return self._of_all(kept, n), dead, aux_coef

    def _of_all(self, kept: Kept, n: int) -> Kept:
        """The entries of this rank that are among the `n` largest of all ranks.

        Ties go to the lower rank, then to the smallest row * d_sae + latent: the order of the whole batch.
        """
        padded = torch.full((n,), -1.0)
        padded[: len(kept.acts)] = kept.acts
        everyone = [torch.empty_like(padded) for _ in range(self._rank.world)]
        dist.all_gather(everyone, padded)
        values = torch.cat(everyone)
        nth = values.topk(n).values[-1]
        if nth < 0:
            return kept
        above = kept.acts > nth
        ties = (kept.acts == nth).nonzero().squeeze(1)
        n_ties = n - int((values > nth).sum()) - sum(int((one == nth).sum()) for one in everyone[: self._rank.index])
        flat = kept.rows[ties].long() * self.state.W_enc.shape[0] + kept.latents[ties]
        above[ties[flat.argsort()[: max(0, n_ties)]]] = True
        return Kept(kept.rows[above], kept.latents[above], kept.acts[above])

    def _gradients(self, x: Tensor, y: Tensor, kept: Kept, dead: Kept | None, aux_coef: Tensor | float) -> Gradients:
        world, share = self._rank.world, 1.0
        if dead is not None:
            # L_aux divides by the variance of the whole batch's residual; the backend knows that of its rows only.
            share = world * self._residual_share(x, y, kept)
        local = super()._gradients(x, y, kept, dead, aux_coef * share)
        d_sae = self.state.W_enc.shape[0]
        whole = {name: _sum(local.rows(name, 0, d_sae)) / world for name in ("W_enc", "W_dec")}
        nested = NestedLoss(
            loss=_sum(local.nested.loss) / world,
            aux_loss=_sum(local.nested.aux_loss * share) / world,
            sq_err=_sum(local.nested.sq_err),
        )
        small = {name: _sum(gradient) / world for name, gradient in sorted(local.small.items())}
        return Gradients(
            nested=nested,
            small=small,
            decoder_dot=_sum(local.decoder_dot) / world,
            rows=lambda name, start, end: whole[name][start:end],
            stored=True,
        )

    def _residual_share(self, x: Tensor, y: Tensor, kept: Kept) -> float:
        """Variance of the residual over this rank's rows, times their number, over the same of the whole batch."""
        weights = self.state.weights()
        order = (kept.rows.long() * self.state.W_enc.shape[0] + kept.latents).argsort()
        starts = torch.searchsorted(kept.rows[order].contiguous(), torch.arange(len(y) + 1, dtype=torch.int32))
        decoded = F.embedding_bag(
            kept.latents[order].long(),
            weights["W_dec"],
            starts,
            per_sample_weights=kept.acts[order],
            mode="sum",
            include_last_offset=True,
        )
        residual = (y - decoded - weights["b_dec"]).double()
        if "W_skip" in weights:
            residual = residual - (x @ weights["W_skip"]).double()
        own = residual.var(0, correction=0).sum() * len(y)
        return float(own / self._spread(residual))

    def _spread(self, values: Tensor) -> Tensor:
        """sum over the whole batch of ||v - mean(v)||^2, for this rank's rows `values` [rows, d], float64."""
        mean = _sum(values.sum(0)) / (len(values) * self._rank.world)
        return _sum((values - mean).square().sum())

    def _count(self, kept: Kept, batch: int, finite: Tensor) -> Tensor:
        settings, state = self.settings, self.state
        positive = kept.acts > 0
        fired = torch.zeros(state.W_enc.shape[0]).index_add_(0, kept.latents, positive.float())
        since = state.tokens_since_fired + batch * self._rank.world
        state.tokens_since_fired.copy_(torch.where(_sum(fired) > 0, 0, since))
        smallest = torch.cat([kept.acts[positive], torch.tensor([torch.inf])]).min()
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        if bool(torch.isfinite(smallest)) and int(state.step) >= settings.threshold_start_step:
            decay = settings.threshold_decay
            average = decay * state.threshold + (1 - decay) * smallest if state.threshold > 0 else smallest
            state.threshold.copy_(average)
        assert bool(finite)  # checked on all ranks alike, before anything is changed
        return _sum(positive.sum().double()) / self._rank.world

    def _sq_err(self, gradients: Gradients, x: Tensor, y: Tensor, kept: Kept) -> Tensor:
        own = super()._sq_err(gradients, x, y, kept)
        # That of the loss is added up already.
        return own if self.settings.sampled_sizes is None else _sum(own)

    def _report(
        self, gradients: Gradients, norm: Tensor, n_kept: Tensor, sq_err: Tensor, y: Tensor, lr: float
    ) -> StepReport:
        report = super()._report(gradients, norm, n_kept, sq_err, y, lr)
        sq_err = sq_err.double()
        return replace(
            report,
            fvu=tuple((sq_err / self._spread(y.double())).tolist()),
            l2_loss=float(sq_err[-1]) / (len(y) * self._rank.world),
        )


def _sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, the same bits on each."""
    total = tensor.detach().clone().contiguous()
    dist.all_reduce(total)
    return total
