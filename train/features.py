"""One step whose latents are spread over ranks, for a dictionary that does not fit into the memory of one device.

Every rank sees the whole batch and holds every world-th latent: its encoder and decoder rows, moments and counters. It
encodes its own latents, offers its largest activations, and keeps those that are among the k * B largest of all ranks;
it decodes what it kept, the partial decodes of all prefixes are added up over ranks, and all gradients of its rows are
then its own business. What is not a latent's (b_dec, W_skip, threshold) is the same on every rank at every step.
Summation order differs from one rank's, so results agree to rounding.

Exchanged in a step: about 2 k B activations (on CUDA k B of each rank), the planes [prefixes, B, d_out] once, k_aux
values a row while latents are dead, and some scalars. Latents are dealt in turn, not in blocks, because the first
groups of a Matryoshka dictionary fire far more often than the last: in blocks, the first rank would have most of the
entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .collectives import among_largest, gather, smallest_, sum_
from .dead import select_dead, select_dead_fixed_shape
from .entries import Kept
from .gradients import Gradients
from .ranks import Rank
from .selection import select_fixed_shape
from .slices import LatentSlice
from .step import StepSettings, StepState, TrainStep
from .update import Measured, measure

COMMON = ("b_dec", "W_skip")
"""Trained tensors that every rank holds whole."""


class FeatureStep(TrainStep):
    """TrainStep on this rank's latents; every rank must call it for every batch, with the same rows."""

    def __init__(self, settings: StepSettings, state: StepState, device: torch.device, rank: Rank) -> None:
        """`state` holds the latents of LatentSlice(rank, d_sae)."""
        self._slice = LatentSlice(rank, sum(settings.group_sizes))
        super().__init__(settings, state, device, latents=self._slice.latents)
        self._rank = rank
        self._join = sum_

    def _largest(self, x: Tensor) -> Kept:
        state, n = self.state, self.settings.k * x.shape[0]
        if self._fixed_shapes:
            own = select_fixed_shape(x, state.W_enc, state.b_enc, n, bf16=self.bf16)
            return among_largest(own, gather(own.acts, self._rank), n, self._rank)
        kept = None
        # Twice a rank's fair part nearly always holds all it has among the n largest; where not, it is asked again.
        for n_asked in (min(n, 2 * n // self._rank.world + 64), n):
            found = self._encoder.select(x, state.W_enc, state.b_enc, n_asked)
            kept = self._of_all(found, n_asked, n)
            if kept is not None:
                break
        assert kept is not None
        return kept

    def _of_all(self, own: Kept, n_asked: int, n: int) -> Kept | None:
        """Those of this rank's entries that are among the `n` largest of all ranks, ties going to the smallest
        row * d_sae + latent of the whole dictionary; None when a rank may hold more of them than it was asked for."""
        offered = torch.full((n_asked,), -1.0)
        offered[: len(own.acts)] = own.acts
        everyone = gather(offered, self._rank)
        values = everyone.view(-1)
        nth = values.topk(n, sorted=False).values.min() if len(values) >= n else torch.tensor(-1.0)
        if n_asked < n and bool((everyone.min(1).values >= nth.clamp_min(0)).any()):
            return None
        if nth < 0:
            return own
        above, ties = own.acts > nth, own.acts == nth
        n_ties = int((values == nth).sum())
        n_wanted = n - int((values > nth).sum())
        if n_ties > n_wanted:
            flat = own.rows[ties].long() * self._slice.d_sae + self._slice.numbers(own.latents[ties])
            padded = torch.full((int((everyone == nth).sum(1).max()),), torch.iinfo(torch.int64).max)
            padded[: len(flat)] = flat
            last = gather(padded, self._rank).view(-1).sort().values[n_wanted - 1]
            ties[ties.nonzero().squeeze(1)[flat > last]] = False
        chosen = above | ties
        return Kept(own.rows[chosen], own.latents[chosen], own.acts[chosen])

    def _select_dead(self, x: Tensor) -> tuple[Kept | None, Tensor | float]:
        """The own dead latents among the k_aux largest of each row over all ranks, and the aux term's coefficient."""
        settings, state = self.settings, self.state
        if settings.auxk_coef == 0:
            return None, 0.0
        is_dead = state.tokens_since_fired >= settings.dead_after_tokens
        n_dead = sum_(is_dead.sum())
        if self._fixed_shapes:
            own = select_dead_fixed_shape(x, state.W_enc, state.b_enc, is_dead, settings.k_aux)
            assert own.selected is not None
            selected = own.selected & self._largest_of_rows(own.acts.masked_fill(~own.selected, -torch.inf), x.shape[0])
            dead = Kept(own.rows, own.latents, torch.where(selected, own.acts, 0.0), selected)
            return dead, settings.auxk_coef * (n_dead / settings.k_aux).clamp_max(1.0)
        if not int(n_dead):
            return None, 0.0
        own = Kept(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
        if bool(is_dead.any()):
            own = select_dead(x, state.W_enc, state.b_enc, is_dead.nonzero().squeeze(1), settings.k_aux)
        chosen = self._largest_of_rows(own.acts, x.shape[0])
        dead = Kept(own.rows[chosen], own.latents[chosen], own.acts[chosen])
        return dead, settings.auxk_coef * min(int(n_dead) / settings.k_aux, 1.0)

    def _largest_of_rows(self, values: Tensor, batch: int) -> Tensor:
        """Which of `values` [batch * n_own], in row order, are among the k_aux largest of their row over all ranks."""
        k = self.settings.k_aux
        offered = torch.full((batch, k), -torch.inf, device=values.device)
        n_own = values.numel() // batch
        offered[:, :n_own] = values.view(batch, n_own)
        everyone = gather(offered, self._rank).permute(1, 0, 2).reshape(batch, -1)
        chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, everyone.topk(k, dim=1).indices, True)
        return chosen.view(batch, self._rank.world, k)[:, self._rank.index, :n_own].reshape(-1)

    def _measure(self, gradients: Gradients) -> Measured:
        return measure(gradients, self.state, over_ranks=sum_, common=COMMON)

    def _smallest(self, acts: Tensor, positive: Tensor) -> Tensor:
        return smallest_(super()._smallest(acts, positive))

    def _count(self, kept: Kept, batch: int, finite: Tensor) -> Tensor:
        return sum_(super()._count(kept, batch, finite))

    def _dead_share(self) -> float:
        n_dead = sum_((self.state.tokens_since_fired >= self.settings.dead_after_tokens).sum())
        return float(n_dead) / self._slice.d_sae
