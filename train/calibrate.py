"""The inference threshold: set after training so that the mean L0 is k on rows that were set aside (set_aside.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshka.ranks import Rank

from .batches.conditioning import Conditioning
from .batches.set_aside import SetAside
from .step.step import StepState

_MAX_ROWS = 2048
_ELEMENTS = 1 << 23
"""Pre-activations in memory at once, 32 MiB."""


def calibrate_threshold(
    state: StepState,
    conditioning: Conditioning,
    aside: SetAside,
    *,
    k: int,
    team: Rank | None = None,
) -> float:
    """The k * n-th largest pre-activation among the n rows of `aside`, in the units of the training step.

    `acts = relu(pre) where pre > threshold` then keeps k latents a row on average. Never below 0: when fewer than
    k * n pre-activations are positive, all of them are kept. `team`: the ranks over which the latents are spread; all
    of them call this together.
    """
    n_wanted = k * aside.n_rows
    # One more than is kept: the threshold itself is not (pre > threshold is strict).
    pool = torch.zeros(0)
    bound = 0.0
    for source in aside.source_rows(rows_at_once(len(state.b_enc))):
        pre_acts = torch.addmm(state.b_enc, conditioning.input(source.to(state.W_enc.device)), state.W_enc.T)
        pool = torch.cat([pool, pre_acts[pre_acts > bound].cpu()])
        if len(pool) > 2 * n_wanted + 1:
            pool = pool.topk(n_wanted + 1).values
            bound = float(pool.min())
    if team is not None:
        pool = _of_all(pool[pool.argsort(descending=True)[: n_wanted + 1]], n_wanted + 1, team)
    if len(pool) <= n_wanted:
        return 0.0
    return float(pool.topk(n_wanted + 1).values.min())


def rows_at_once(d_sae: int) -> int:
    """Rows that are encoded together."""
    return max(1, min(_MAX_ROWS, _ELEMENTS // d_sae))


def _of_all(own: Tensor, n: int, team: Rank) -> Tensor:
    """The positive values of all ranks; each gives at most `n`."""
    import torch.distributed as dist

    padded = torch.zeros(n)
    padded[: len(own)] = own
    everyone = torch.empty(team.world, n)
    dist.all_gather(list(everyone.unbind(0)), padded)
    return everyone[everyone > 0]
