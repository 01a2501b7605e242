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

from collections.abc import Callable

import torch
from torch import Tensor

from matryoshka.ranks import Rank

from ..step.communicator import Communicator
from ..step.sparse_acts import SparseActs
from .collectives import among_largest, gather, smallest_, sum_
from .latent_slice import LatentSlice


class LatentsOverRanks(Communicator):
    """This rank's latents of `d_sae`; every rank must take every step, with the same rows."""

    common = ("b_dec", "W_skip")

    def __init__(self, rank: Rank, d_sae: int) -> None:
        self._rank, self._slice = rank, LatentSlice(rank, d_sae)
        self.latents = self._slice.latents

    def sum_over_latents(self, part: Tensor) -> Tensor:
        return sum_(part)

    def smallest(self, part: Tensor) -> Tensor:
        return smallest_(part)

    def largest(self, select: Callable[[int], SparseActs], n: int, batch: int, *, fixed_shapes: bool) -> SparseActs:  # noqa: ARG002
        if fixed_shapes:
            own = select(n)
            offered = own.acts.new_zeros(n)  # a rank with fewer latents than k has fewer entries
            offered[: own.acts.shape[0]] = own.acts
            return among_largest(own, gather(offered, self._rank), n, self._rank)
        # Twice a rank's fair part nearly always holds all it has among the n largest; where not, it is asked again.
        for n_asked in (min(n, 2 * n // self._rank.world + 64), n):
            kept = self._of_all(select(n_asked), n_asked, n)
            if kept is not None:
                return kept
        raise AssertionError("a rank that is asked for n entries holds no more of the n largest")

    def _of_all(self, own: SparseActs, n_asked: int, n: int) -> SparseActs | None:
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
        return SparseActs(own.rows[chosen], own.latents[chosen], own.acts[chosen])

    def largest_of_rows(self, own: SparseActs, batch: int, k: int) -> SparseActs:
        values = own.acts if own.selected is None else own.acts.masked_fill(~own.selected, -torch.inf)
        offered = torch.full((batch, k), -torch.inf, device=values.device)
        n_own = values.numel() // batch
        offered[:, :n_own] = values.view(batch, n_own)
        everyone = gather(offered, self._rank).permute(1, 0, 2).reshape(batch, -1)
        chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, everyone.topk(k, dim=1).indices, True)
        chosen = chosen.view(batch, self._rank.world, k)[:, self._rank.index, :n_own].reshape(-1)
        if own.selected is None:
            return SparseActs(own.rows[chosen], own.latents[chosen], own.acts[chosen])
        chosen &= own.selected
        return SparseActs(own.rows, own.latents, torch.where(chosen, own.acts, 0.0), chosen)
