"""Logistic regression, by scikit-learn, and how well it tells the classes apart.

The one file that imports scikit-learn, which the extra `[probing]` installs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from matryoshka.errors import UserError

_MOST_STEPS = 1000


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """score = x @ weight + bias; above 0 the class is predicted."""

    weight: Float[np.ndarray, " d"]
    bias: float

    def score(self, x: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, " rows"]:
        """Log-odds of each row."""
        return x @ self.weight + self.bias

    def direction(self) -> Float[np.ndarray, " d"]:
        """The weight at unit length."""
        return self.weight / np.linalg.norm(self.weight)


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a yes-or-no prediction."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    """2 TP / (2 TP + FP + FN); 0 when nothing is right"""


def require_sklearn() -> None:
    """Raise UserError when scikit-learn is not installed; asked before any long pass."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise UserError(
            "probes are fitted with scikit-learn, which is not installed here; install it with "
            "`pip install -e '.[probing]'` in the checkout, or `pip install scikit-learn`"
        ) from error


def fit_probe(x: Float[np.ndarray, "rows d"], y: Bool[np.ndarray, " rows"], *, c: float, balanced: bool) -> LinearProbe:
    """L2-regularised logistic regression of `y` on `x`; each column is standardised for the fit, and unfolded after.

    `c` is scikit-learn's inverse strength (sum of losses x c + ||w||^2 / 2); with `balanced` both classes weigh the
    same, as in SAEBench's absorption probes.
    """
    # Whitening by column decides how soon the solver is there, and makes `c` mean the same on activations of any scale.
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1).astype(x.dtype)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, class_weight="balanced" if balanced else None, max_iter=_MOST_STEPS)
    _fit(model, (x - mean) / scale, y)
    weight = (_fitted(model) / scale).astype(np.float64)
    bias = float(np.asarray(model.intercept_).item()) - float(mean.astype(np.float64) @ weight)
    return LinearProbe(weight=weight, bias=bias)


def l1_weights(codes: Any, y: Bool[np.ndarray, " rows"], *, l1: float, seed: int) -> Float[np.ndarray, " latents"]:
    """Weights of a logistic regression on sparse codes [rows, latents] that minimise

        mean loss, a positive row weighing n_negative / n_positive,  +  l1 * sum |w|

    on activations in units of their root mean square where they are not 0 (one factor for all latents: `l1` then means
    the same for every transcoder).
    """
    from sklearn.linear_model import LogisticRegression

    unit = float(np.sqrt(np.mean(np.square(codes.data, dtype=np.float64)))) if codes.nnz else 1.0
    weight = {False: 1.0, True: float((~y).sum() / y.sum())}
    model = LogisticRegression(
        solver="liblinear",
        l1_ratio=1.0,
        C=1 / (l1 * len(y)),
        class_weight=weight,
        max_iter=_MOST_STEPS,
        random_state=seed,
    )
    _fit(model, (codes / unit).astype(np.float64), y)
    return _fitted(model)


def quality(y: Bool[np.ndarray, " rows"], said: Bool[np.ndarray, " rows"]) -> Quality:
    """How good the prediction `said` of `y` is."""
    hit, wrong, missed = (int(np.sum(both)) for both in (y & said, ~y & said, y & ~said))
    return Quality(
        accuracy=float(np.mean(y == said)),
        precision=hit / (hit + wrong) if hit else 0.0,
        recall=hit / (hit + missed) if hit else 0.0,
        f1=2 * hit / (2 * hit + wrong + missed) if hit else 0.0,
    )


def _fitted(model: Any) -> np.ndarray:
    return np.asarray(model.coef_)[0]


def _fit(model: Any, x: Any, y: np.ndarray) -> None:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # A probe that is not quite at its optimum is still judged by what it does on held-out rows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
