"""What a harvest tells of itself while it works, and the display of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from matryoshka.progress import ProgressDisplay, in_notebook
from matryoshka.terminal import note

from .estimate import Estimate, gigabytes


class Progress(Protocol):
    """Somebody who is told."""

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """Everything is checked and the first shard is about to be made."""
        ...

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """`n_tokens` more have been through the model, or were committed by an earlier run."""
        ...

    def noted(self, text: str) -> None:
        """Something to know at once."""
        ...


class NoProgress:
    """Progress for nobody."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """Say nothing."""

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """Say nothing."""

    def noted(self, text: str) -> None:
        """Say nothing."""


class HarvestDisplay:
    """The estimate, then tokens, tokens a second, time left and bytes; use it as a context."""

    def __init__(self) -> None:
        self._display = ProgressDisplay("harvest", "tokens", {"": gigabytes})
        self._n_tokens = 0

    def __enter__(self) -> HarvestDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, traceback)

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """Print the estimate and show the bar."""
        note(describe(estimate))
        self._display.replace("", n_tokens_total)

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """Move the bar."""
        self._n_tokens += n_tokens
        self._display.update("", self._n_tokens, {"": bytes_written})

    def noted(self, text: str) -> None:
        """Print it above the bar."""
        note(text, warning=True, to=self._display.console)


def usual_progress() -> HarvestDisplay | NoProgress:
    """For a harvest that Python code starts: a bar in a notebook, else nothing."""
    return HarvestDisplay() if in_notebook() else NoProgress()


def describe(estimate: Estimate) -> str:
    """An estimate as one line."""
    time_needed = "" if estimate.seconds is None else f", about {timedelta(seconds=round(estimate.seconds))}"
    free = " in the store" if estimate.free_bytes is None else f" on disk ({gigabytes(estimate.free_bytes)} free)"
    return f"{estimate.n_tokens:,} tokens to harvest: about {gigabytes(estimate.n_bytes)}{free}{time_needed}"


def describe_codec(measured: Mapping[str, float]) -> str:
    """What the codec did, as one line."""
    errors = [
        f"{name.removesuffix('_error')} {value:.2%}" for name, value in measured.items() if name.endswith("_error")
    ]
    lost = f", relative error of {', '.join(errors)} outside attention sinks" if errors else ""
    return f"activations take {measured['compression_ratio']:.3f} of raw bfloat16{lost}"
