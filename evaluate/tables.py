"""How the cells and titles of the tables on the terminal say what they say."""

from __future__ import annotations

from .result import TranscoderFacts

FEW_DOCUMENTS = 20
"""With fewer, percentile intervals are too narrow, and little more than a hint (Cameron, Gelbach & Miller 2008)."""


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


def over_documents(*counts: int | None) -> str:
    """What the intervals of some results are over, for a caption; results that drew contexts have no count."""
    found = [count for count in counts if count is not None]
    if len(found) < len(counts):
        return "over contexts, so too narrow (made by an older version)"
    fewest, most = min(found), max(found)
    number = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"over {number} documents{' (few documents)' if fewest < FEW_DOCUMENTS else ''}"
