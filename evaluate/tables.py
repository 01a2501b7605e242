"""How the cells and titles of the tables on the terminal say what they say."""

from __future__ import annotations

from .result import TranscoderFacts


def number(value: float | None, form: str) -> str:
    """`value` in the format `form`, such as ".4f" or ".0%"; a dash where it is not defined."""
    return "-" if value is None else f"{value:{form}}"


def with_interval(value: float | None, interval: tuple[float, float] | None, form: str) -> str | tuple[str, str]:
    """A cell: `value` with its interval; in its short form with half the interval's width."""
    if value is None or interval is None:
        return number(value, form)
    half = (interval[1] - interval[0]) / 2
    whole = f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
    return whole, f"{value:{form}} +-{half:{form.removeprefix('+')}}"


def run_and_step(transcoder: TranscoderFacts) -> str:
    """How a title names the weights: the run, and the step where they come from one."""
    return transcoder.run if transcoder.step is None else f"{transcoder.run}, step {transcoder.step:,}"
