"""How every command speaks: results to stdout, all else to stderr, and lines that are broken between words alone.

What is to be copied (a path, the next command) stays whole in one line at any width.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """stdout, or stderr; what is printed is text, never markup. In a notebook both are its cell."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def note(text: str, *, warning: bool = False, to: Console | None = None) -> None:
    """A sentence on stderr; outside a terminal one line, whatever its length."""
    _say(to or console(stderr=True), text, "yellow" if warning else "")


def note_file(file: Path | None) -> None:
    """Say which settings file was read, so that none is ever read unnoticed."""
    if file is not None:
        note(f"settings: {file}, under the flags of the command line")


def result(text: str) -> None:
    """A sentence that the command was asked for, on stdout."""
    _say(console(), text, "")


def show(renderable: RenderableType, to: Console | None = None) -> None:
    """Print a table on stdout. What is wider than the terminal is not cut."""
    (to or console()).print(renderable, crop=False)


def next_command(*words: str | Path) -> None:
    """The command that usually comes next, on stderr, ready to be pasted."""
    console(stderr=True).print(Text(f"next: {quoted(words)}"), soft_wrap=True)


def quoted(words: Sequence[str | Path]) -> str:
    """A command line that a shell reads as `words`."""
    return shlex.join(map(str, words))


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns; a word that is longer has a line of its own, whole."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]
    return lines


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` columns, cut in its middle: runs of a sweep differ at their ends."""
    if cell_len(name) <= width:
        return name
    head = (width - 1) // 2
    return name[:head] + "\u2026" + name[len(name) - (width - 1 - head) :]


def _say(to: Console, text: str, style: str) -> None:
    # A file has no width: one line, so that it can be searched.
    lines = wrapped(text, to.width) if to.is_terminal else text.splitlines()
    for line in lines:
        to.print(Text(line, style=style), soft_wrap=True)
