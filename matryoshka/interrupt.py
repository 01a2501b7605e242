"""Ctrl-C and SIGTERM: a command ends in order, says how to go on, and exits with 130 or 143 as a shell expects.

`stoppable` turns the first signal into the exception Stopped, which unwinds the command: locks are released, threads
that write are waited for. A second one ends the process at once, which is as safe as kill -9. Inside a `StopRequest`
the first signal is only noted, for work that ends better after its step in hand.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal ended the command. No Exception, so that nothing takes it for a failure that it can handle."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal ended."""
        return 128 + self.signal


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the main thread at the first SIGTERM or SIGINT."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    before = {}
    for number in SIGNALS:
        # A shell starts what runs in the background with SIGINT ignored, and so it stays.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Notes SIGTERM and SIGINT while it is open; a second signal does what it would have done outside.

    Outside the main thread, where Python can take no signals, it hears nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that has come, if any."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def deliver(self) -> None:
        """Close, and let the noted signal do what it would have done outside."""
        assert self.signal is not None
        self.__exit__(None, None, None)
        signal.raise_signal(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            return
        before = self._before[signal.Signals(number)]
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt
