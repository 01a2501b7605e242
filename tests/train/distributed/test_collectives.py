"""Which of a rank's entries are among the largest of all ranks, with shapes that do not depend on the data."""

from __future__ import annotations

import torch

from matryoshka.ranks import Rank
from train.distributed.collectives import among_largest
from train.step.sparse_acts import SparseActs


def test_a_rank_may_have_fewer_entries_than_it_offers() -> None:
    acts = [torch.tensor([5.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 2.0, 6.0])]
    offers = torch.stack([torch.cat([acts[0], torch.zeros(1)]), acts[1]])
    kept = []
    for index, own in enumerate(acts):
        n = len(own)
        entries = SparseActs(torch.arange(n, dtype=torch.int32), torch.arange(n, dtype=torch.int32), own, own > 0)
        kept.append(among_largest(entries, offers, 4, Rank(index, 2)))
    assert [part.acts.tolist() for part in kept] == [[5.0, 0.0, 3.0], [4.0, 0.0, 0.0, 6.0]]
    assert [part.selected.tolist() for part in kept if part.selected is not None] == [
        [True, False, True],
        [True, False, False, True],
    ]
