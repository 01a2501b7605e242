"""The table of `evaluate absorption`."""

from __future__ import annotations

from matryoshka.tables import ResultTable

from ...tables import number, run_and_step
from .result import AbsorptionResult, Interval, PrefixAbsorption

_CAPTION = (
    "fraction, full: SAEBench's two scores, 0 is none. missed: no main latent fires. main: latents of a letter, and "
    "their F1. Intervals are 95%, over words."
)
_TRUSTED_F1 = 0.5


def absorption_table(result: AbsorptionResult) -> ResultTable:
    """One line a nested prefix, then one a letter of the last one."""
    n_passed = sum(probe.passed for probe in result.probes)
    table = ResultTable(
        title=f"{run_and_step(result.transcoder)}: first-letter absorption, {n_passed} letters, "
        f"{result.n_test_rows:,} {result.shard_set.rows} of {result.shard_set.name}",
        caption=_CAPTION + _doubt(result.prefixes[-1]),
    )
    for name in ("prefix", "fraction", "+-", "full", "+-", "missed", "main", "F1", "probe F1", "rows"):
        table.add_column(name, drop=1 if name in ("rows", "missed") else 0)
    probes = {probe.letter: probe.f1 for probe in result.probes}
    for prefix in result.prefixes:
        table.add_row(*_line(prefix), ends_section=prefix is result.prefixes[-1])
    for letter in result.prefixes[-1].letters:
        n_main = len(letter.main_latents)
        f1s = (letter.k_sparse_f1[n_main - 1], probes[letter.letter])
        scores = (letter.absorption_fraction, letter.full_absorption, letter.missed, *f1s)
        fraction, full, missed, f1, probe_f1 = (number(score, ".3f") for score in scores)
        row = (letter.letter, fraction, "", full, "", missed, str(n_main), f1, probe_f1)
        table.add_row(*row, f"{letter.n_true_positives:,}")
    return table


def _doubt(prefix: PrefixAbsorption) -> str:
    """What to say where no latent is a latent of its letter: the scores then count nothing that was absorbed."""
    if prefix.main_f1 is None or prefix.main_f1 >= _TRUSTED_F1:
        return ""
    return (
        f" Main latents predict their letters with an F1 of only {prefix.main_f1:.2f}: the transcoder has hardly any "
        "first-letter latents that could be absorbed, and the scores say little of it."
    )


def _line(prefix: PrefixAbsorption) -> tuple[str, ...]:
    return (
        f"{prefix.prefix_end:,}",
        number(prefix.absorption_fraction, ".3f"),
        _half(prefix.absorption_fraction_interval),
        number(prefix.full_absorption, ".3f"),
        _half(prefix.full_absorption_interval),
        number(prefix.missed, ".3f"),
        number(prefix.n_main_latents, ".1f"),
        number(prefix.main_f1, ".3f"),
        "",
        f"{sum(letter.n_true_positives for letter in prefix.letters):,}",
    )


def _half(interval: Interval | None) -> str:
    return "" if interval is None else f"{(interval[1] - interval[0]) / 2:.3f}"
