"""Cells and titles of the tables."""

from __future__ import annotations

import pytest

from evaluate.result import TranscoderFacts
from evaluate.tables import number, run_and_step, with_interval


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


def test_an_interval_and_its_short_form() -> None:
    assert with_interval(0.25, (0.2, 0.32), ".2f") == ("0.25 [0.20, 0.32]", "0.25 +-0.06")
    assert with_interval(-0.5, (-0.75, -0.25), "+.1f") == ("-0.5 [-0.8, -0.2]", "-0.5 +-0.2")
    assert with_interval(0.25, None, ".2f") == "0.25"
    assert with_interval(None, (0.2, 0.31), ".2f") == "-"
