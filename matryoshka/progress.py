"""How far a command is: one display for harvest, train and evaluate.

    on a terminal      a bar in one line, or a small table for several runs; drawn again twice a second
    in a notebook      a bar of the page (rich has none there without ipywidgets)
    anywhere else      Slurm, nohup, a pipe, `!harvest run` in a notebook: a plain line a minute

A display that is too narrow leaves out what matters least; no number is ever cut.
"""

from __future__ import annotations

import html
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from matryoshka.tables import ResultTable
from matryoshka.terminal import console, shortened

FIRST_SECONDS, EVERY_SECONDS = 10.0, 60.0
"""Without a terminal: when the first line comes, so that one sees that it works, and the time between the others."""
_PACE_SECONDS = 60.0
_PACE_STEP = 0.5
_PAGE_SECONDS = 0.5
_BAR_LENGTHS = (8, 40)
_TABLE_ROWS = 3
"""Lines of the terminal that a table of runs leaves free."""


@dataclass(slots=True)
class Work:
    """Something that has a known size, and how much of it is done."""

    name: str
    total: int
    done: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)
    outcome: str = ""
    """Why it goes on no more."""
    clock: Callable[[], float] = time.monotonic
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, done: int, facts: Mapping[str, float]) -> None:
        """Note that `done` units are done."""
        now = self.clock()
        if not self._marks:
            self._marks.append((now, self.done))
        self.done, self.facts = done, facts or self.facts
        if now - self._marks[-1][0] >= _PACE_STEP:
            self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _PACE_SECONDS:
            self._marks.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second, over about the last minute; None before it can be told."""
        if len(self._marks) < 2:
            return None
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - begin)

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None before it can be told."""
        return (self.total - self.done) / self.rate if self.rate else None


class _View(Protocol):
    """A way to show the work."""

    def start(self) -> None: ...

    def refresh(self) -> None: ...

    def stop(self) -> None: ...


class ProgressDisplay:
    """Shows the works that are added to it until it is left; use it as a context.

    `facts` are what is said of a work beside its size: name -> how its number is written, what matters most first.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        facts: Mapping[str, Callable[[float], str]] | None = None,
        to: Console | None = None,
    ) -> None:
        self.what, self.unit, self.facts = what, unit, facts or {}
        self.works: dict[str, Work] = {}
        self.console = to or console(stderr=True)
        self._view: _View | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.stop()
            self._view = None

    def add(self, name: str, total: int, done: int = 0) -> None:
        """Show one more work."""
        self.works[name] = Work(name, total, done)
        if self._view is None:
            self._view = _view_of(self)
            self._view.start()

    def replace(self, name: str, total: int) -> None:
        """Show this work and no other: those before it are over."""
        self.works.clear()
        self.add(name, total)

    def update(self, name: str, done: int, facts: Mapping[str, float] | None = None) -> None:
        """Note how much is done, and the newest facts where there are new ones."""
        self.works[name].update(done, facts or {})
        if self._view is not None:
            self._view.refresh()

    def end(self, name: str, outcome: str) -> None:
        """Note that a work goes on no more."""
        self.works[name].outcome = outcome

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        works = list(self.works.values())
        if len(works) == 1:
            yield bar_line(self, works[0], options.max_width, ascii_only=options.ascii_only)
        elif works:
            yield work_table(self, works[: max(1, (options.height or options.size.height) - _TABLE_ROWS)])


def bar_line(display: ProgressDisplay, work: Work, width: int, *, ascii_only: bool = False) -> Text:
    """Name, bar, size, facts, rate and time left in one line of at most `width` columns."""
    count = f"{work.done:,}/{work.total:,}"
    # (text, how soon it is left out)
    parts = [(count, 0), (display.unit, 5), (_percent(work), 9)]
    parts += [
        (f"{name} {form(work.facts[name])}".strip(), 2 + 2 * place)
        for place, (name, form) in enumerate(display.facts.items())
        if name in work.facts
    ]
    parts += [(_rate(work), 7), (_left(work), 1)]
    parts = [part for part in parts if part[0]]
    name = shortened(f"{display.what} {work.name}".strip(), max(12, width // 3))

    def text() -> str:
        # The unit stands close to its number.
        return "  ".join(part for part, _ in parts).replace(f"{count}  {display.unit}", f"{count} {display.unit}")

    while len(name) + 2 + len(text()) > width and max(rank for _, rank in parts) > 0:
        parts.remove(max(parts, key=lambda part: part[1]))
    least, most = _BAR_LENGTHS
    length = min(most, width - len(name) - len(text()) - 4)
    bar = f"{_bar(work, length, ascii_only)}  " if length >= least else ""
    return Text(f"{name}  {bar}{text()}", no_wrap=True, overflow="ignore")


def plain_line(display: ProgressDisplay) -> str:
    """The same for a file: one line for all works."""
    works = list(display.works.values())
    if len(works) == 1:
        (work,) = works
        facts = [f"{name} {form(work.facts[name])}" for name, form in display.facts.items() if name in work.facts]
        parts = [f"{work.done:,}/{work.total:,} {display.unit} ({_percent(work)})", _rate(work, display.unit)]
        parts += [_left(work), *(fact.strip() for fact in facts)]
        return f"{display.what} {work.name}".strip() + ": " + ", ".join(part for part in parts if part)
    slowest = min(works, key=lambda work: work.done / max(work.total, 1))
    parts = [f"{slowest.done:,}/{slowest.total:,} {display.unit} ({_percent(slowest)})", _rate(slowest, display.unit)]
    parts.append(_left(slowest))
    for name, form in display.facts.items():
        values = [work.facts[name] for work in works if name in work.facts]
        if values:
            parts.append(f"{name} {form(min(values))} to {form(max(values))}".strip())
    over = sum(bool(work.outcome) for work in works)
    runs = f"{len(works)} runs" + (f", {over} of them over" if over else "")
    return f"{display.what}: {runs}: " + ", ".join(part for part in parts if part)


def work_table(display: ProgressDisplay, works: list[Work]) -> ResultTable:
    """Several works under each other."""
    table = ResultTable()
    table.add_column(display.what, left=True)
    table.add_column(display.unit)
    for place, name in enumerate(display.facts):
        table.add_column(name, drop=1 + place)
    table.add_column("left")
    longest = max(12, max(len(work.name) for work in works))
    for work in works:
        facts = [form(work.facts[name]) if name in work.facts else "" for name, form in display.facts.items()]
        left = work.outcome or _left(work).removesuffix(" left")
        table.add_row(shortened(work.name, min(longest, 24)), f"{work.done:,}/{work.total:,}", *facts, left)
    return table


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return console().is_jupyter


def _view_of(display: ProgressDisplay) -> _View:
    if display.console.is_jupyter:
        return _Page(display)
    # A command that a cell starts with `!` has a terminal of a kind, in which a line cannot be drawn again.
    if display.console.is_terminal and "JPY_PARENT_PID" not in os.environ:
        return _Screen(display)
    return _Log(display)


class _Screen:
    """A terminal."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._live = Live(
            console=display.console,
            get_renderable=lambda: display,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> None:
        self._live.start()

    def refresh(self) -> None:
        """It has a thread that does this."""

    def stop(self) -> None:
        self._live.stop()


class _Log:
    """A file: a line now and then, from a thread of its own, so that it comes during a long step too."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def refresh(self) -> None:
        """The thread does this."""

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._say()

    def _beat(self) -> None:
        seconds = FIRST_SECONDS
        while not self._over.wait(seconds):
            self._say()
            seconds = EVERY_SECONDS

    def _say(self) -> None:
        self._display.console.print(Text(plain_line(self._display)), soft_wrap=True)


class _Page:
    """The output of a notebook's cell."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        self._shown: Any = None
        self._time = 0.0

    def start(self) -> None:
        # There in every notebook: the kernel is made of it.
        from IPython.display import display

        self._shown = display(self._content(), raw=True, display_id=True)

    def refresh(self) -> None:
        if time.monotonic() - self._time >= _PAGE_SECONDS:
            self._draw()

    def stop(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._time = time.monotonic()
        self._shown.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        return {"text/html": page_bars(self._display), "text/plain": plain_line(self._display)}


def page_bars(display: ProgressDisplay) -> str:
    """HTML: a bar and its numbers for each work."""
    lines = []
    for work in display.works.values():
        facts = [f"{name} {form(work.facts[name])}" for name, form in display.facts.items() if name in work.facts]
        numbers = [f"{work.done:,}/{work.total:,} {display.unit}", *facts, _rate(work), work.outcome or _left(work)]
        lines.append(
            f"<tr><td>{html.escape(f'{display.what} {work.name}'.strip())}</td>"
            f'<td><progress value="{work.done}" max="{max(work.total, 1)}"></progress></td>'
            f"<td>{html.escape(', '.join(number.strip() for number in numbers if number))}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _bar(work: Work, length: int, ascii_only: bool) -> str:
    full = length if work.total == 0 else min(length, work.done * length // work.total)
    return ("#" * full + "-" * (length - full)) if ascii_only else ("\u2501" * full + "\u2500" * (length - full))


def _percent(work: Work) -> str:
    return f"{min(1.0, work.done / work.total if work.total else 1.0):.0%}"


def _rate(work: Work, unit: str = "") -> str:
    if work.rate is None or work.outcome:
        return ""
    digits = 0 if work.rate >= 100 else 1 if work.rate >= 1 else 3
    return f"{work.rate:,.{digits}f}{f' {unit}' if unit else ''}/s"


def _left(work: Work) -> str:
    if work.outcome or work.seconds_left is None or work.done >= work.total:
        return work.outcome
    return f"{duration(work.seconds_left)} left"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
