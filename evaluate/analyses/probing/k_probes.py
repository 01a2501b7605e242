"""k-sparse probing: how well the k latents that differ most between two classes tell them apart.

SAEBench (arXiv 2503.09532; sparse_probing/probe_training.py), after Gurnee et al. 2023 (arXiv 2305.01610): for each
class, its examples against as many drawn from the other classes;  d_i = |mean of latent i over the class - mean over
the others|  on the train examples; the k latents with the largest d_i go into a logistic regression (L2, C = 1), whose
accuracy on the test examples is the score, and the mean over the classes that of the label set. Columns are
standardised for the fit, which SAEBench does not do: C = 1 then means the same at any scale of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...measures.probe import Quality, fit_probe, quality
from ...measures.row_acts import RowActs

_C = 1.0


@dataclass(frozen=True, slots=True)
class Examples:
    """Balanced examples of one class against the others: rows of a larger set."""

    rows: Int[Tensor, " examples"]
    is_class: Bool[np.ndarray, " examples"]


@dataclass(frozen=True, slots=True)
class KProbe:
    """One k of one class."""

    k: int
    latents: tuple[int, ...]
    quality: Quality


def balanced(label: Int[Tensor, " rows"], number: int, most: int, generator: torch.Generator) -> Examples:
    """At most `most` rows of class `number` and as many of the others; which ones is drawn.

    The other classes take turns, so that each gives the same share unless it has fewer. Where the others together have
    fewer rows than the class, both sides have as many as they.
    """
    own = (label == number).nonzero().squeeze(1)
    others = [(label == other).nonzero().squeeze(1) for other in torch.unique(label).tolist() if other != number]
    own = own[torch.randperm(len(own), generator=generator)][:most]
    drawn = [rows[torch.randperm(len(rows), generator=generator)] for rows in others]
    turn = torch.cat([torch.arange(len(rows)) for rows in drawn] or [own[:0]])
    negative = torch.cat(drawn or [own[:0]])[turn.argsort(stable=True)][: len(own)]
    own = own[: len(negative)]
    is_class = np.arange(len(own) + len(negative)) < len(own)
    return Examples(torch.cat([own, negative]), is_class)


def mean_difference(codes: RowActs, examples: Examples) -> Float[Tensor, " latents"]:
    """|mean over the class - mean over the others| of every latent, float64."""
    sign = torch.zeros(codes.n_rows, dtype=torch.float64)
    is_class = torch.from_numpy(examples.is_class)
    sign[examples.rows[is_class]] = 1 / int(is_class.sum())
    sign[examples.rows[~is_class]] = -1 / int((~is_class).sum())
    sums = torch.zeros(codes.n_latents, dtype=torch.float64, device=codes.value.device)
    sums.index_add_(0, codes.latent, codes.value.double() * sign.to(sums.device)[codes.row()])
    return sums.abs()


def k_sparse(train: RowActs, on: Examples, test: RowActs, scored_on: Examples, ks: tuple[int, ...]) -> list[KProbe]:
    """A probe for each k in `ks`; a k above the number of latents takes them all."""
    ranking = mean_difference(train, on).sort(descending=True, stable=True).indices[: max(ks)]
    x_train, x_test = (
        codes.dense(ranking).cpu()[examples.rows].numpy() for codes, examples in ((train, on), (test, scored_on))
    )
    probes = []
    for k in ks:
        probe = fit_probe(x_train[:, :k], on.is_class, c=_C, balanced=False)
        found = quality(scored_on.is_class, probe.score(x_test[:, :k]) > 0)
        probes.append(KProbe(k, tuple(ranking[:k].tolist()), found))
    return probes


def dense_top_k(
    x_train: Float[np.ndarray, "rows d"],
    on: Examples,
    x_test: Float[np.ndarray, "rows d"],
    scored_on: Examples,
    k: int | None,
    c: float,
) -> Quality:
    """The same with the k dimensions of an activation that differ most; all of them with k None."""
    train, test = x_train[on.rows.numpy()], x_test[scored_on.rows.numpy()]
    difference = np.abs(train[on.is_class].mean(0, dtype=np.float64) - train[~on.is_class].mean(0, dtype=np.float64))
    chosen = np.argsort(-difference, kind="stable")[:k]
    probe = fit_probe(train[:, chosen], on.is_class, c=c, balanced=False)
    return quality(scored_on.is_class, probe.score(test[:, chosen]) > 0)
