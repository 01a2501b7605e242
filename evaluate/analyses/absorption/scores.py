"""The published absorption scores of one class, row by row.

From SAEBench (arXiv 2503.09532; absorption/feature_absorption_calculator.py), which follows Chanin et al. 2024 (arXiv
2409.14507, section 5) with the projection on the probe in place of an ablation. For a row on which the probe is right:

    c_i = cos(v_i, p),   a_i = f_i (v_i . p),   total = x . p - c . p,   M = the class's main latents

full absorption      no latent of M fires; the latent j with the largest a_j has c_j >= 0.025 and a_j >= 0.4 total, and
                     total > 0
absorption fraction  main = sum over M of a_i; A = the sum of the 3 largest a_i > 0 outside M with c_i >= 0.1.
                     0 where total <= 0, main >= total or A < 0.4 total;  1 where main <= 0;
                     else B / (B + main) with B = min(A, total - main)

The class's scores are sums over the rows divided by the number of rows on which the probe is right.

v_i is row i of an SAE's decoder; for a transcoder it is that of `readback`, at the site that the probe and the encoder
read. Three things differ from SAEBench. (1) That decoder. (2) The constant c of x ~ c + f V is taken off the
projection: latents are not there to write it. (SAEBench takes x . p as it is.) (3) v_i need not have unit length, so
a_i is f_i (v_i . p), of which SAEBench's f_i cos(v_i, p) is the case ||v_i|| = 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from ...measures.row_acts import RowActs

FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
SHARE = 0.4
MAX_ABSORBING = 3


@dataclass(frozen=True, slots=True)
class RowScores:
    """One entry for each row on which the probe is right."""

    fraction: Float[np.ndarray, " rows"]
    """Absorption fraction, 0 to 1."""
    full: Bool[np.ndarray, " rows"]
    """Full absorption."""
    missed: Bool[np.ndarray, " rows"]
    """No main latent fires, whatever the others do: full absorption at its most."""
    absorber: np.ndarray
    """Latent with the largest projection where there is full absorption, else -1; int64."""

    def absorbers(self) -> Counter[int]:
        """How many rows each absorbing latent absorbs."""
        return Counter(self.absorber[self.full].tolist())


def score_rows(
    codes: RowActs,
    projection: Float[np.ndarray, " rows"],
    along: Float[np.ndarray, " latents"],
    cosine: Float[np.ndarray, " latents"],
    main: tuple[int, ...],
) -> RowScores:
    """Score the rows of `codes`, on all of which the probe is right.

    `projection` is `total` of each row, `along` v_i . p and `cosine` c_i of each latent.
    """
    starts, latents, values = (tensor.cpu().numpy() for tensor in (codes.starts, codes.latent, codes.value))
    is_main = np.zeros(codes.n_latents, dtype=bool)
    is_main[list(main)] = True
    n = codes.n_rows
    fraction, full, missed = np.zeros(n), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    absorber = np.full(n, -1, dtype=np.int64)
    for row in range(n):
        row_slice = slice(starts[row], starts[row + 1])
        firing = latents[row_slice]
        written = values[row_slice].astype(np.float64) * along[firing]
        total, ours = float(projection[row]), is_main[firing]
        missed[row] = not ours.any()
        others = ~ours & (cosine[firing] >= FRACTION_COSINE) & (written > 0)
        fraction[row] = absorption_fraction(total, float(written[ours].sum()), written[others])
        if missed[row] and len(firing):
            top = int(written.argmax())
            full[row] = total > 0 and cosine[firing[top]] >= FULL_COSINE and written[top] >= SHARE * total
            if full[row]:
                absorber[row] = firing[top]
    return RowScores(fraction=fraction, full=full, missed=missed, absorber=absorber)


def absorption_fraction(total: float, main: float, others: Float[np.ndarray, " others"]) -> float:
    """The absorption fraction of one row; `others` are the projections of the latents that may absorb."""
    absorbing = float(np.sort(others)[-MAX_ABSORBING:].sum())
    if total <= 0 or main >= total or absorbing < SHARE * total:
        return 0.0
    if main <= 0:
        return 1.0
    absorbed = min(absorbing, total - main)
    return absorbed / (absorbed + main)
