"""Cells and titles of the tables, and their two widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from evaluate.result import TranscoderFacts
from evaluate.tables import number, result_table, run_and_step


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (0.12345, ".4f", "0.1235"),
        (0.125, ".0%", "12%"),
        (0.5, "+.3f", "+0.500"),
        (0.0, ".1f", "0.0"),
        (None, ".4f", "-"),
    ],
)
def test_a_number_or_a_dash(value: float | None, form: str, expected: str) -> None:
    assert number(value, form) == expected


def test_weights_outside_a_run_have_no_step() -> None:
    facts = {"run": "l3-k4", "sha256": "abc", "config": {}}
    assert run_and_step(TranscoderFacts(**facts, step=12_000)) == "l3-k4, step 12,000"
    assert run_and_step(TranscoderFacts(**facts, step=None)) == "l3-k4"


@pytest.mark.parametrize(("narrow", "head"), [(True, "FVU  L0"), (False, "FVU   L0")])
def test_a_line_under_the_head_and_no_frame(narrow: bool, head: str) -> None:
    table = result_table(narrow=narrow)
    for name in ("FVU", "L0"):
        table.add_column(name, justify="right")
    table.add_row("1", "2")
    console = Console(width=40, file=io.StringIO(), record=True)
    console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == [head, "\u2500" * len(head), head.replace("FVU", "  1").replace("L0", " 2")]
