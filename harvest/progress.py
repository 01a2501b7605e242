"""What a harvest shows on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .estimate import Estimate, gigabytes
from .sets import HarvestResult


class Screen:
    """A progress bar with tokens, tokens/s, time left and bytes; use it as a context."""

    def __init__(self) -> None:
        # Paths and numbers are printed as they are, never taken for markup or broken into lines of 80.
        self._console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("harvest"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[size]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("harvest", total=None, rate="", size="")

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """Print the estimate and show the bar."""
        self._console.print(describe(estimate))
        self._bar.update(self._task, total=n_tokens_total)
        self._bar.start()

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, n_tokens)
        speed = self._bar.tasks[0].speed
        rate = "" if speed is None else f"{speed:,.0f} tok/s"
        self._bar.update(self._task, rate=rate, size=gigabytes(bytes_written))

    def report(self, results: Sequence[HarvestResult]) -> None:
        """Say what is there now."""
        for result in results:
            per_token = result.bytes_on_disk / result.n_tokens
            size = f"{result.n_tokens:,} tokens, {gigabytes(result.bytes_on_disk)}, {per_token:.0f} bytes per token"
            if result.n_shards_written == 0:
                self._console.print(f"{result.path}: nothing left to do ({size})")
            else:
                self._console.print(f"{result.path}: {result.n_shards_written} shards written ({size})")
                self._console.print(f"{result.path}: {describe_codec(result.measured)}")
            if result.n_tokens < result.n_tokens_planned:
                self._console.print(
                    f"the text ended early: {result.n_tokens:,} of {result.n_tokens_planned:,} tokens", style="yellow"
                )


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
