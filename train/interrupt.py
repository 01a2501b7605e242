"""SIGTERM and Ctrl-C as a request that all ranks of a training hear: the step in hand is finished, then they end."""

from __future__ import annotations

import signal

from matryoshka.interrupt import StopRequest


class SharedStopRequest(StopRequest):
    """A signal to one process of the process group is a request to all."""

    def agree(self) -> bool:
        """Whether a signal has come to any process of the process group; all call this together."""
        import torch
        import torch.distributed as dist

        number = torch.tensor(0 if self.signal is None else int(self.signal))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if int(number):
            self.signal = signal.Signals(int(number))
        return self.signal is not None
