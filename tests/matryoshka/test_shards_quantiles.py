"""Quantiles in two passes against numpy's over everything at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from matryoshka.shards.quantiles import quantiles

LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


def numbers(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = {
        "norms": np.concatenate([rng.normal(50, 3, n), rng.normal(2e4, 10, n // 50)]),
        "same": np.full(n, 3.7),
        "zeros": np.where(rng.random(n) < 0.5, 0, 1e-40),
        "wide": np.exp(rng.normal(0, 20, n)),
    }[kind]
    return np.abs(values).astype(np.float32)


@pytest.mark.parametrize("kind", ["norms", "same", "zeros", "wide"])
@pytest.mark.parametrize("n", [1, 2, 3, 101, 20_000])
def test_equal_to_numpy(kind: str, n: int) -> None:
    values = numbers(kind, n)

    def pieces() -> Iterator[np.ndarray]:
        yield from np.array_split(values, 7)

    assert quantiles(pieces, LEVELS) == np.quantile(values.astype(np.float64), LEVELS).tolist()
