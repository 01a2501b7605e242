"""SIGTERM and Ctrl-C as a request: the step in hand is finished, checkpoints are written, and the command ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Listens for SIGTERM (pre-emption) and SIGINT (Ctrl-C) while it is open; a second signal ends at once.

    Outside the main thread, where Python can take no signals, it hears nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that has come, if any."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> bool:
        """Whether a signal has come to any process of the process group; all call this together."""
        import torch
        import torch.distributed as dist

        number = torch.tensor(0 if self.signal is None else int(self.signal))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if int(number):
            self.signal = signal.Signals(int(number))
        return self.signal is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
