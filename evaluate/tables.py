"""The look of the tables on the terminal, and how their cells say a number."""

from __future__ import annotations

from rich import box
from rich.table import Table

from .result import TranscoderFacts


def result_table(
    title: str | None = None, caption: str | None = None, *, narrow: bool = True, show_footer: bool = False
) -> Table:
    """A table without columns or rows: a line under the head and no frame.

    `narrow` takes one space off each gap between columns, for tables of many short numbers.
    """
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=narrow,
        show_edge=False,
        show_footer=show_footer,
    )


def number(value: float | None, form: str) -> str:
    """`value` in the format `form`, such as ".4f" or ".0%"; a dash where it is not defined."""
    return "-" if value is None else f"{value:{form}}"


def run_and_step(transcoder: TranscoderFacts) -> str:
    """How a title names the weights: the run, and the step where they come from one."""
    return transcoder.run if transcoder.step is None else f"{transcoder.run}, step {transcoder.step:,}"
