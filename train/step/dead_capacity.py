"""How many latents can be dead in a step, known to the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HORIZON = 32
"""Steps that one count holds for: so many, or an eighth of those after which a latent is dead, if that is less. Half of
them pass between asking for a count and reading it."""
_LEAST = 64


class DeadCapacity:
    """The length of a list that holds every dead latent, in each step.

    A latent that is dead in one of the next steps has been silent for at least `dead_after_tokens` less what
    these steps bring: their number now is a bound for all these steps. It is copied to the host while the device works
    on, and read half a horizon later, when it has long been there. Only the first is waited for. While nothing can be
    dead it is 0.
    """

    def __init__(self) -> None:
        self._step = 0
        self._valid_until = 0
        self._bound = 0
        # until which step a count holds, the count, and when it is on the host
        self._asked: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def at(
        self, tokens_since_fired: Tensor, dead_after_tokens: int, n_rows: int, largest: Callable[[Tensor], Tensor]
    ) -> int:
        """The capacity in this step, which is asked for once in each; 0 when nothing is dead.

        `n_rows`: rows of a batch; `largest`: a count -> the largest of all ranks, which ask together.
        """
        step, self._step = self._step, self._step + 1
        horizon = max(2, min(HORIZON, dead_after_tokens // (8 * n_rows)))
        if self._asked is None and step + horizon // 2 >= self._valid_until:
            silent = (tokens_since_fired + horizon * n_rows >= dead_after_tokens).sum()
            count = largest(silent).to("cpu", non_blocking=True)
            self._asked = (step + horizon, count, _recorded(silent))
        if step >= self._valid_until:
            assert self._asked is not None
            until, count, event = self._asked
            if event is not None:
                event.synchronize()
            self._bound, self._valid_until, self._asked = int(count), until, None
        return _rounded(self._bound, tokens_since_fired.shape[0])


def _recorded(count: Tensor) -> torch.cuda.Event | None:
    """An event behind the copy of a count to the host. Fake tensors are on a device that is not there."""
    if not count.is_cuda or not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(count.device))
    return event


def _rounded(n: int, most: int) -> int:
    """`n` up to a multiple of an eighth of the next power of two, so that shapes seldom change; at most `most`."""
    if n <= 0:
        return 0
    unit = max(_LEAST, (1 << (n - 1).bit_length()) // 8)
    return min(-(-n // unit) * unit, most)
