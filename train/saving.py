"""Checkpoints written behind the back of training, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BackgroundWriter:
    """Runs one job at a time in a thread; use it as a context, at whose end the last job is done.

    A job works on a snapshot. At most one is held in memory: handing over the next waits for the one before, and
    raises what that raised.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True)
        if error is None:
            self.wait()

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job; call `wait` before the snapshot for it is taken."""
        self.wait()
        self._pending = self._executor.submit(job)

    def wait(self) -> None:
        """Return when nothing is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
