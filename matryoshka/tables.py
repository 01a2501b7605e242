"""A table of numbers that is readable at any width: nothing is cut, and no cell is broken in two.

rich.table folds or crops cells that do not fit, and has no lines that cross its columns. Here a table that is too wide
for its terminal, in this order: closes up its columns, puts the columns that name a row on a line above it, says
intervals in their short form, puts long texts on a line below the row, and at last leaves out columns, which it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from matryoshka.terminal import wrapped

Cell = str | tuple[str, str]
"""What a cell says; or that and a shorter form of it."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    name: str
    left: bool = False
    stack: Literal["", "above", "below"] = ""
    """Where its cells go, with its name before them, when they do not fit beside the others."""
    drop: int = 0
    """Columns with the largest number are left out first; those with 0 never are."""


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[Cell, ...]
    ends_section: bool


@dataclass(frozen=True, slots=True)
class _Layout:
    """One way to show the table."""

    gap: int
    stacked: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()
    short: bool = False


@dataclass(slots=True)
class ResultTable:
    """Rows of cells under named columns; print it with `matryoshka.terminal.show`."""

    title: str = ""
    caption: str = ""
    columns: list[Column] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    footer: tuple[str, ...] = ()
    show_head: bool = True

    @property
    def row_count(self) -> int:
        """Rows that were added."""
        return len(self.rows)

    def add_column(
        self, name: str, *, left: bool = False, stack: Literal["", "above", "below"] = "", drop: int = 0
    ) -> None:
        """The next column; a row that is added later has a cell for it."""
        self.columns.append(Column(name, left, stack, drop))

    def add_row(self, *cells: Cell, ends_section: bool = False) -> None:
        """One line. After `ends_section` comes an empty one."""
        assert len(cells) == len(self.columns)
        self.rows.append(_Row(cells, ends_section))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layout, left_out = self._fitted(options.max_width)
        rule = "-" if options.ascii_only else "\u2500"
        yield from (_line(line, "bold") for line in wrapped(self.title, options.max_width))
        yield from self._lines(layout, rule, options.max_width)
        notes = f"Left out at this width: {', '.join(self.columns[i].name for i in left_out)}." if left_out else ""
        for text in (self.caption, notes):
            yield from (_line(line, "dim") for line in wrapped(text, options.max_width))

    def _fitted(self, width: int) -> tuple[_Layout, list[int]]:
        """The first layout that is no wider than `width`, and the columns that it leaves out."""
        every = tuple(range(len(self.columns)))
        above, below = (tuple(i for i in every if self.columns[i].stack == where) for where in ("above", "below"))
        beside = tuple(i for i in every if i not in above)
        numbers = tuple(i for i in beside if i not in below)
        choices = [_Layout(gap, (), every) for gap in (2, 1)]
        choices += [_Layout(2, above, beside)]
        choices += [_Layout(gap, (), every, short=True) for gap in (2, 1)]
        choices += [_Layout(gap, above, beside, short=True) for gap in (2, 1)]
        choices += [_Layout(gap, (*above, *below), numbers, short=short) for short in (False, True) for gap in (2, 1)]
        for choice in choices:
            if self._width(choice) <= width:
                return choice, []
        layout, left_out = choices[-1], []
        while self._width(layout) > width:
            first = max(layout.shown, key=lambda i: self.columns[i].drop, default=None)
            if first is None or self.columns[first].drop == 0:
                break
            left_out.append(first)
            layout = replace(layout, shown=tuple(i for i in layout.shown if i != first))
        return layout, sorted(left_out)

    def _width(self, layout: _Layout) -> int:
        widths = [self._column_width(i, layout) for i in layout.shown]
        return sum(widths) + layout.gap * (len(widths) - 1)

    def _column_width(self, index: int, layout: _Layout) -> int:
        cells = [_said(row.cells[index], layout.short) for row in self.rows]
        if self.show_head:
            cells.append(self.columns[index].name)
        if self.footer:
            cells.append(self.footer[index])
        return max(map(cell_len, cells), default=0)

    def _lines(self, layout: _Layout, rule: str, width: int) -> Iterator[Text]:
        columns = [self.columns[i] for i in layout.shown]
        widths = [self._column_width(i, layout) for i in layout.shown]

        def line(cells: Sequence[str], style: str = "") -> Text:
            placed = [_placed(cell, w, column.left) for cell, w, column in zip(cells, widths, columns, strict=True)]
            return _line((" " * layout.gap).join(placed).rstrip(), style)

        if self.show_head:
            yield line([column.name for column in columns], "dim")
            yield _line(rule * self._width(layout))
        for number, row in enumerate(self.rows):
            yield from self._stacked(row, layout, "above", width)
            yield line([_said(row.cells[i], layout.short) for i in layout.shown])
            yield from self._stacked(row, layout, "below", width)
            if row.ends_section and number < len(self.rows) - 1:
                yield Text("")
        if self.footer:
            yield Text("")
            yield line([self.footer[i] for i in layout.shown])

    def _stacked(self, row: _Row, layout: _Layout, where: str, width: int) -> Iterator[Text]:
        """The cells that are not beside the others: the first without the name of its column."""
        said = []
        for index in layout.stacked:
            column, cell = self.columns[index], _said(row.cells[index], short=False)
            if column.stack == where and cell:
                said.append(cell if where == "above" and not said else f"{column.name} {cell}")
        joined = ", ".join(said) if where == "above" else "; ".join(said)
        if joined:
            indent = "" if where == "above" else "  "
            for part in wrapped(joined, width - len(indent)):
                yield _line(indent + part, "bold" if where == "above" else "")


def _said(cell: Cell, short: bool) -> str:
    return cell if isinstance(cell, str) else cell[short]


def _placed(cell: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(cell))
    return cell + space if left else space + cell


@dataclass(frozen=True, slots=True)
class FactTable:
    """Names and what is to be said of each; long texts go on under themselves, or under their name."""

    title: str
    facts: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        names = max((cell_len(name) for name, _ in self.facts), default=0)
        yield from (_line(line, "bold") for line in wrapped(self.title, width))
        for name, text in self.facts:
            lines = wrapped(text, width - names - 2)
            if any(cell_len(line) > width - names - 2 for line in lines):
                yield _line(name)
                yield from (_line(f"  {line}") for line in wrapped(text, width - 2))
                continue
            for number, line in enumerate(lines):
                yield _line(f"{name if number == 0 else '':{names}}  {line}")


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ignore")
