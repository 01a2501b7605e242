"""Tables at every width: no number is cut, no cell is broken in two, and what is left out is named."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from matryoshka.tables import FactTable, ResultTable
from matryoshka.terminal import show

NAME = "data/runs/a-rather-long-name-of-a-run-k96"


def shown(table: ResultTable | FactTable, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None, markup=False, highlight=False)
    show(table, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def table(name: str = NAME) -> ResultTable:
    made = ResultTable(title="two runs", caption="what the columns mean")
    made.add_column("run", left=True, stack="above")
    made.add_column("reads", left=True, stack="above")
    made.add_column("FVU")
    made.add_column("cosine", drop=1)
    made.add_column("norm", drop=2)
    made.add_column("likely", left=True, stack="below")
    made.add_row(name, "mlp_in", ("0.3846 [0.3791, 0.3902]", "0.3846 +-0.0056"), "0.8063", "0.840", "'the' 'of'")
    made.add_row("b", "resid_mid", "0.5", "0.7", "0.6", "'a'")
    return made


def test_all_beside_each_other_where_there_is_room() -> None:
    assert shown(table("a"), 90) == [
        "two runs",
        "run  reads                          FVU  cosine   norm  likely",
        "\u2500" * 66,
        "a    mlp_in     0.3846 [0.3791, 0.3902]  0.8063  0.840  'the' 'of'",
        "b    resid_mid                      0.5     0.7    0.6  'a'",
        "what the columns mean",
    ]


def test_names_of_rows_go_above_before_anything_is_shortened() -> None:
    assert shown(table(), 60)[1:5] == [
        "                    FVU  cosine   norm  likely",
        "\u2500" * 50,
        f"{NAME}, reads mlp_in",
        "0.3846 [0.3791, 0.3902]  0.8063  0.840  'the' 'of'",
    ]


def test_then_intervals_are_short_then_texts_go_below_then_columns_go() -> None:
    assert "0.3846 +-0.0056  0.8063  0.840  'the' 'of'" in shown(table(), 48)
    narrow = shown(table(), 32)
    assert "0.3846 +-0.0056  0.8063  0.840" in narrow
    assert "  likely 'the' 'of'" in narrow
    assert narrow[-2:] == ["  likely 'a'", "what the columns mean"]
    least = shown(table(), 26)
    assert "0.3846 +-0.0056 0.8063" in least
    assert least[-2:] == ["Left out at this width:", "norm."]


@pytest.mark.parametrize("width", range(16, 100))
def test_no_word_is_broken_at_any_width(width: int) -> None:
    words = set(" ".join(shown(table(), 200)).split())
    for line in shown(table(), width):
        for word in line.strip().split():
            known = word in words or word.rstrip(",:") in words or word.startswith("+-")
            assert known or set(word) == {"\u2500"} or word.strip(".,:") in "Left out at this width norm cosine", word
        assert len(line) <= width or len(line.split()) == 1 or NAME in line


def test_sections_and_a_footer() -> None:
    made = ResultTable(footer=("12", ""))
    made.add_column("n")
    made.add_column("x")
    for n in (5, 7):
        made.add_row(str(n), "1", ends_section=True)
    assert shown(made, 20) == [" n  x", "\u2500" * 5, " 5  1", "", " 7  1", "", "12"]
    assert made.row_count == 2


def test_wide_characters_take_two_columns() -> None:
    made = ResultTable()
    made.add_column("token", left=True)
    made.add_column("n")
    made.add_row("\u65e5\u672c", "1")
    made.add_row("ab", "22")
    assert shown(made, 40)[2:] == ["\u65e5\u672c    1", "ab     22"]


def test_facts() -> None:
    facts = FactTable("l15", [("tokens", "200,192 in 782 contexts"), ("model", "/a/folder/with/a/long/name")])
    assert shown(facts, 60) == ["l15", "tokens  200,192 in 782 contexts", "model   /a/folder/with/a/long/name"]
    assert shown(facts, 20) == [
        "l15",
        "tokens  200,192 in",
        "        782 contexts",
        "model",
        "  /a/folder/with/a/long/name",
    ]


def test_ascii_where_the_terminal_has_no_more() -> None:
    console = Console(width=30, file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), color_system=None)
    show(table("a"), console)
    console.file.flush()
    text = console.file.buffer.getvalue().decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    assert re.search(r"^-+$", text, re.MULTILINE)
