"""For every latent the few best of a stream of windows, without duplicates, with the activations inside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...rows.windows import mixed

EMPTY = -1
_LATENT_FACTOR = -7046029254386353131


class TopWindows:
    """The `n_kept` windows of the highest score of each latent; of equal windows only the one of the highest score.

    Pushed in parts it keeps what it would keep if all were pushed at once: what is dropped has `n_kept` better and
    different ones before it. Among equal scores the earlier place wins, so parts must be pushed in order of place.
    Memory is d_sae * n_kept * (width + 7) * 4 bytes, whatever is pushed.
    """

    SUMS = ("score", "key", "place", "value", "_acts", "_acts_index")

    def __init__(self, d_sae: int, n_kept: int, width: int, device: torch.device) -> None:
        self.score = torch.full((d_sae, n_kept), EMPTY, dtype=torch.int64, device=device)
        """[d_sae, n_kept] int64, best first; EMPTY where there are not that many"""
        self.key = torch.zeros_like(self.score)
        """[d_sae, n_kept] int64: equal windows have equal keys"""
        self.place = torch.zeros_like(self.score)
        """[d_sae, n_kept] int64"""
        self.value = torch.zeros(d_sae, n_kept, device=device)
        """[d_sae, n_kept] float32: activation at the place"""
        self._acts = torch.zeros(d_sae, n_kept, width, device=device)
        self._acts_index = torch.zeros_like(self.score)
        """[d_sae, n_kept] int64: index of the window in _acts, so that stored windows never move"""

    def floor(self) -> Tensor:
        """[d_sae] int64: a score must be above it to be kept."""
        return self.score[:, -1]

    def acts(self, latent: Tensor, slot: Tensor) -> Tensor:
        """Activations [n, width] in windows, by latent and place in the order of the scores."""
        return self._acts[latent, self._acts_index[latent, slot]]

    def push(
        self,
        latent: Tensor,
        score: Tensor,
        key: Tensor,
        place: Tensor,
        value: Tensor,
        acts_of: Callable[[Tensor], Tensor],
    ) -> None:
        """Push n windows, ordered by latent and then by place; scores are not negative.

        `acts_of` gives the activations [m, width] of m of them, by their numbers; it is asked only for those that stay.
        """
        if len(latent) == 0:
            return
        touched, local = latent.unique_consecutive(return_inverse=True)
        (n_touched, n_kept), n_old = (len(touched), self.score.shape[1]), len(touched) * self.score.shape[1]
        owner = torch.arange(n_touched, device=latent.device).repeat_interleave(n_kept)
        owner = torch.cat([owner, local])
        joined = {
            name: torch.cat([getattr(self, name)[touched].flatten(), new])
            for name, new in (("score", score), ("key", key), ("place", place), ("value", value))
        }
        chosen = _best_of_each(owner, joined["score"], joined["key"])
        of = owner[chosen]
        starts = torch.searchsorted(of, torch.arange(n_touched, device=of.device))
        rank = torch.arange(len(of), device=of.device) - starts[of]
        stays = rank < n_kept
        chosen, of, rank = chosen[stays], of[stays], rank[stays]
        for name, fill in (("score", EMPTY), ("key", 0), ("place", 0), ("value", 0)):
            column = joined[name].new_full((n_touched, n_kept), fill)
            column[of, rank] = joined[name][chosen]
            getattr(self, name)[touched] = column
        self._store(touched, of, rank, chosen, n_old, acts_of)

    def _store(
        self, touched: Tensor, of: Tensor, rank: Tensor, chosen: Tensor, n_old: int, acts_of: Callable[[Tensor], Tensor]
    ) -> None:
        """Put the windows that are new into the slots that those dropped leave empty."""
        is_old = chosen < n_old
        slots = self._acts_index[touched]
        stayed, old_of = slots.flatten()[chosen[is_old]], of[is_old]
        taken = torch.zeros_like(slots, dtype=torch.uint8)
        taken[old_of, stayed] = 1
        # Empty ones first, in order: the j-th new window of a latent goes into its j-th empty slot.
        empty = taken.sort(dim=1, stable=True).indices
        new_of = of[~is_old]
        number = torch.arange(len(new_of), device=of.device) - torch.searchsorted(new_of, new_of)
        placed = empty[new_of, number]
        slots[old_of, rank[is_old]] = stayed
        slots[new_of, rank[~is_old]] = placed
        self._acts_index[touched] = slots
        self._acts[touched[new_of], placed] = acts_of(chosen[~is_old] - n_old)


def _best_of_each(owner: Tensor, score: Tensor, key: Tensor) -> Tensor:
    """Numbers of the entries that are no duplicates, ordered by owner and then by falling score."""
    order = score.sort(descending=True, stable=True).indices
    order = order[owner[order].sort(stable=True).indices]
    joint = mixed(key + owner * _LATENT_FACTOR)[order]
    ordered, by_joint = joint.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    is_best = torch.zeros_like(is_first)
    is_best[by_joint] = is_first
    return order[is_best & (score[order] != EMPTY)]
