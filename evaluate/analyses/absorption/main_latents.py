"""Which latents represent a class: k-sparse probing, with k raised while F1 still improves (feature splitting).

Chanin et al. 2024 (arXiv 2409.14507, section 4) as SAEBench computes it (absorption/k_sparse_probing.py): latents are
ranked by an L1-regularised probe; the k best go into a logistic regression of their own; where F1 jumps by more than
0.03 from k - 1 to k, the class is split over k latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from ...measures.probe import fit_probe, l1_weights, quality
from ...measures.row_acts import RowActs

L1 = 0.01
"""SAEBench's k_sparse_probe_l1_decay."""
MAX_K = 10
"""SAEBench's max_k_value."""
_C = 1.0


@dataclass(frozen=True, slots=True)
class MainLatents:
    """The latents of a class."""

    latents: tuple[int, ...]
    """Best first; empty when no latent predicts the class."""
    f1: tuple[float, ...]
    """Test F1 of the k-sparse probe, k = 1, 2, ..., to the first k that did not pay."""


def find_main_latents(
    train: RowActs,
    y_train: Bool[np.ndarray, " train_rows"],
    test: RowActs,
    y_test: Bool[np.ndarray, " test_rows"],
    *,
    jump: float,
    seed: int,
) -> MainLatents:
    """The first k latents of the ranking, k the last one with F1(k) > best before + `jump`."""
    weights = l1_weights(train.scipy(), y_train, l1=L1, seed=seed)
    # Only latents that predict the class: SAEBench takes the largest weights, not the largest absolute ones.
    ranking = np.argsort(-weights, kind="stable")[:MAX_K]
    ranking = ranking[weights[ranking] > 0]
    best, k, scores = -np.inf, 0, []
    columns = torch.from_numpy(ranking.copy()).to(train.latent.device)
    x_train, x_test = (codes.dense(columns).cpu().numpy() for codes in (train, test))
    for tried in range(1, len(ranking) + 1):
        probe = fit_probe(x_train[:, :tried], y_train, c=_C, balanced=True)
        scores.append(quality(y_test, probe.score(x_test[:, :tried]) > 0).f1)
        if scores[-1] <= best + jump:
            break
        best, k = scores[-1], tried
    return MainLatents(latents=tuple(int(latent) for latent in ranking[:k]), f1=tuple(scores))
