"""The prefixes in the loss, drawn anew for each step: a pure function of (seed, step).

With fixed groups every latent knows its group; with sampled prefixes the order of all latents matters, as the loss may
cut anywhere. Drawn as in Nabeshima's Matryoshka SAEs (2024; compared with fixed groups in Bussmann et al. 2025,
"Learning Multi-Level Features with Matryoshka Sparse Autoencoders"): end m with a density of 1 / sqrt(m), so that short
prefixes come often, and the full width always.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

_STREAM = 0x9E4D
"""Keeps these draws apart from others with the same seed."""


def sampled_sizes(d_sae: int, n_prefixes: int, *, seed: int, step: int) -> tuple[int, ...]:
    """Disjoint sizes of `n_prefixes` groups that sum to `d_sae`: their running sums are the prefix ends.

    The other n_prefixes - 1 ends are distinct, from 1 to d_sae - 1, so n_prefixes is at most d_sae.
    """
    assert 1 <= n_prefixes <= d_sae
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed & (2**64 - 1), _STREAM, step])))
    ends: set[int] = set()
    while len(ends) < n_prefixes - 1:
        # The inverse of the distribution function (sqrt(m) - 1) / (sqrt(d_sae) - 1) on [1, d_sae).
        root = 1 + float(generator.random()) * (math.sqrt(d_sae) - 1)
        ends.add(min(int(root * root), d_sae - 1))
    return tuple(b - a for a, b in pairwise((0, *sorted(ends), d_sae)))
