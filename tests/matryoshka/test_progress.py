"""Progress on terminals of several widths, in a notebook, and in a log."""

from __future__ import annotations

import io
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from matryoshka import progress
from matryoshka.progress import ProgressDisplay, Work, bar_line, page_bars, plain_line, work_table
from matryoshka.terminal import shortened

FACTS = {"loss": "{:.3f}".format, "FVU": "{:.3f}".format, "dead": "{:.0%}".format, "L0": "{:.0f}".format}
VALUES = {"loss": 0.4321, "FVU": 0.3517, "dead": 0.034, "L0": 96.2}


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def work(name: str = "l17-k96", done: int = 123_456, total: int = 150_000) -> Work:
    clock = Clock()
    made = Work(name, total, clock=clock)
    made.update(0, {})
    clock.now += 1000
    made.update(done, VALUES)
    return made


def display() -> ProgressDisplay:
    return ProgressDisplay("train", "steps", FACTS)


def test_the_rate_is_that_of_the_last_minute() -> None:
    """A harvest that passes over what it has already must not promise an end in a second."""
    clock = Clock()
    made = Work("", 10_000, clock=clock)
    assert made.rate is None
    made.update(0, {})
    clock.now += 1
    made.update(5_000, {})  # there already
    assert made.rate == pytest.approx(5_000)
    for step in range(1, 101):
        clock.now += 2
        made.update(5_000 + 10 * step, {})
    assert made.rate == pytest.approx(5)
    assert made.seconds_left == pytest.approx(4_000 / 5)


def test_a_step_that_takes_longer_than_a_minute_has_a_rate() -> None:
    clock = Clock()
    made = Work("", 10, clock=clock)
    made.update(0, {})
    for step in (1, 2, 3):
        clock.now += 300
        made.update(step, {})
    assert made.rate == pytest.approx(1 / 300)
    made.total = 1_000
    assert made.seconds_left == pytest.approx(997 * 300)


@pytest.mark.parametrize("width", range(40, 160))
def test_a_bar_leaves_out_and_never_cuts(width: int) -> None:
    line = bar_line(display(), work(), width).plain
    assert len(line) <= width
    known = {"l17-k96", "L0", "123,456/150,000", "82%", "0.432", "0.352", "3%", "96", "123/s", "0:03:35"}
    assert set(re.findall(r"\S*\d\S*", line)) <= known
    assert "123,456/150,000" in line
    if width >= 60:
        assert "loss 0.432" in line
        assert "0:03:35 left" in line
    if width >= 120:
        for part in ("steps", "82%", "FVU 0.352", "dead 3%", "L0 96", "123/s", "\u2501"):
            assert part in line


def display_with(*works: Work) -> ProgressDisplay:
    made = display()
    made.works = {one.name: one for one in works}
    return made


def test_a_line_in_a_log() -> None:
    assert plain_line(display_with(work())) == (
        "train l17-k96: 123,456/150,000 steps (82%), 123 steps/s, 0:03:35 left, loss 0.432, FVU 0.352, dead 3%, L0 96"
    )


def test_a_fleet_is_one_line_in_a_log() -> None:
    first, other, over = work("a"), work("b", done=120_000), work("c", done=150_000)
    other.facts = {**VALUES, "loss": 0.6}
    over.outcome = "finished"
    assert plain_line(display_with(first, other, over)) == (
        "train: 3 runs, 1 of them over: 120,000/150,000 steps (80%), 120 steps/s, 0:04:10 left, loss 0.432 to 0.600, "
        "FVU 0.352 to 0.352, dead 3% to 3%, L0 96 to 96"
    )


@pytest.mark.parametrize("width", [60, 80])
def test_a_fleet_is_a_table(width: int) -> None:
    works = [work("k32-group_sizes=1152,2304,4608,10368"), work("b")]
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(work_table(display(), works))
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(len(line) <= width for line in lines)
    assert sum("123,456/150,000" in line and "0:03:35" in line and "0.432" in line for line in lines) == 2


def test_names_are_shortened_in_their_middle() -> None:
    assert shortened("k32-lr0.0004", 20) == "k32-lr0.0004"
    assert shortened("group_sizes=1152,2304-k32", 12) == "group\u202604-k32"


def test_a_page_has_bars() -> None:
    assert page_bars(display_with(work("<b>"))) == (
        '<table><tr><td>train &lt;b&gt;</td><td><progress value="123456" max="150000"></progress></td>'
        "<td>123,456/150,000 steps, loss 0.432, FVU 0.352, dead 3%, L0 96, 123/s, 0:03:35 left</td></tr></table>"
    )


def test_a_log_has_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.05)
    console = Console(file=io.StringIO(), width=20)
    with ProgressDisplay("harvest", "tokens", to=console) as shown:
        shown.replace("", 3_000_000)
        shown.update("", 1_000_000)
        deadline = time.monotonic() + 20
        while console.file.getvalue().count("\n") < 3 and time.monotonic() < deadline:  # pyright: ignore
            time.sleep(0.01)
        shown.update("", 3_000_000)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert lines[0].startswith("harvest: 1,000,000/3,000,000 tokens (33%)")
    assert lines[-1].startswith("harvest: 3,000,000/3,000,000 tokens (100%)")
    assert len(lines) >= 4


SCRIPT = """
import time
from matryoshka.progress import ProgressDisplay
with ProgressDisplay("harvest", "tokens", {"": "{:.1f} GB".format}) as display:
    display.replace("", 15_000_000)
    for done in range(1, 6):
        time.sleep(0.6)
        display.update("", done * 2_468_013, {"": done * 16.25})
"""


@pytest.mark.parametrize("columns", [60, 80])
def test_a_bar_on_a_real_terminal(in_terminal: Callable[..., Any], columns: int) -> None:
    shown = in_terminal([sys.executable, "-c", SCRIPT], columns)
    assert shown.code == 0, shown.err
    assert all(len(line) <= columns for line in shown.drawn)
    assert [line for line in shown.drawn if "12,340,065/15,000,000" in line and " GB" in line and "left" in line]
    numbers = re.findall(r"[\d,]+(?=/15,000,000)", "\n".join(shown.drawn))
    assert {int(number.replace(",", "")) for number in numbers} <= {n * 2_468_013 for n in range(6)}
    assert len(numbers) > 3


def test_a_command_that_a_cell_starts_speaks_in_lines(in_terminal: Callable[..., Any]) -> None:
    """`!harvest run` has a terminal in which a line cannot be drawn again."""
    shown = in_terminal([sys.executable, "-c", SCRIPT], 80, JPY_PARENT_PID="1")
    assert shown.err.count("harvest: 12,340,065/15,000,000 tokens (82%)") == 1
    assert "\x1b[2K" not in shown.err


def test_a_notebook_has_a_bar_and_a_cell_that_starts_a_command_is_not_blank(tmp_path: Path) -> None:
    """In a real kernel, as test_tutorial.py starts one."""
    import nbclient
    import nbformat

    book = nbformat.v4.new_notebook()
    (tmp_path / "script.py").write_text(SCRIPT)
    book.cells = [nbformat.v4.new_code_cell(SCRIPT), nbformat.v4.new_code_cell(f"!{sys.executable} script.py")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zmq and of the event loop
        nbclient.NotebookClient(book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (bar,) = [output for output in book.cells[0].outputs if "text/html" in output.get("data", {})]
    assert '<progress value="12340065" max="15000000">' in bar["data"]["text/html"]
    said = "".join(output["text"] for output in book.cells[1].outputs)
    assert "harvest: 12,340,065/15,000,000 tokens (82%)" in said
