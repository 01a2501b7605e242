"""Reads a transcoder's code back at its INPUT: the decoder that an SAE would have at the encoder's site.

The published absorption scores are about SAEs: they split the projection of an activation x on a probe direction p into
what each latent writes, f_i (d_i . p), d_i a row of the decoder. A transcoder's decoder writes at another site, where p
has no meaning, and neither has d_i . p. Its code still represents x; what a latent represents is the row v_i of

    V = argmin_V  sum_rows ||x - mean(x) - (f - mean(f)) V||^2  +  sum_i s_i^2 ||v_i||^2        x ~ c + sum_i f_i v_i

with s_i the root mean square of latent i where it fires (one made-up row in which it fires and x is the mean: a latent
that was seen n times keeps about n / (n + 1) of its row, one that was never seen has none). c = mean(x) - mean(f) V.
For an SAE trained to its optimum V is its decoder but for that term. No label enters, so all rows may be used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...measures.row_acts import RowActs

_TOLERANCE = 1e-3
_MOST_STEPS = 200
"""Latents that nearly always fire together converge slowly; what is left undecided between them counts for either."""
_N_NORM_DIRECTIONS = 64


@dataclass(frozen=True, slots=True)
class Readback:
    """V seen along some unit directions p of the encoder's site."""

    along: Float[Tensor, "latents directions"]
    """v_i . p"""
    norm: Float[Tensor, " latents"]
    """||v_i||, estimated from 64 random projections: standard error 9% (Johnson & Lindenstrauss)."""
    intercept: Float[Tensor, " directions"]
    """c . p"""

    def cosine(self) -> Float[Tensor, "latents directions"]:
        """cos(v_i, p); 0 for a latent without a row."""
        return self.along / self.norm.clamp_min(torch.finfo(self.norm.dtype).tiny)[:, None]


def norm_directions(d_in: int, seed: int) -> Float[Tensor, "d_in 64"]:
    """Random directions z with E ||v z||^2 = ||v||^2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_in, _N_NORM_DIRECTIONS, generator=generator) / _N_NORM_DIRECTIONS**0.5


def fit_readback(codes: RowActs, projected: Float[Tensor, "rows directions_and_64"]) -> Readback:
    """Fit V from the codes of rows and their inputs along the directions, those of `norm_directions` last of all."""
    mean_x = projected.mean(0)
    solution, mean_f = _solve(codes, projected - mean_x)
    intercept = mean_x - mean_f @ solution
    along, random = solution[:, :-_N_NORM_DIRECTIONS], solution[:, -_N_NORM_DIRECTIONS:]
    return Readback(along=along, norm=random.norm(dim=1), intercept=intercept[:-_N_NORM_DIRECTIONS])


def _solve(codes: RowActs, x: Float[Tensor, "rows directions"]) -> tuple[Tensor, Tensor]:
    """V [latents, directions] and mean(f), by preconditioned conjugate gradients, all columns of `x` at once.

    (Hestenes & Stiefel 1952; Golub & Van Loan, algorithm 11.5.1.) Latents are scaled by 1 / s_i, which makes the
    penalty the identity.
    """
    n, m = codes.n_rows, codes.n_latents
    row, order = codes.row(), torch.argsort(codes.latent, stable=True)
    by_latent = F.pad(torch.bincount(codes.latent, minlength=m).cumsum(0), (1, 0))
    squares = torch.zeros(m, device=x.device).index_add_(0, codes.latent, codes.value.square())
    scale = (by_latent.diff() / squares.clamp_min(torch.finfo(squares.dtype).tiny)).sqrt()
    value = codes.value * scale[codes.latent]
    mean = torch.zeros(m, device=x.device).index_add_(0, codes.latent, value) / n

    def decoded(v: Tensor) -> Tensor:
        """(f - mean(f)) v"""
        out = F.embedding_bag(
            codes.latent, v, codes.starts, per_sample_weights=value, mode="sum", include_last_offset=True
        )
        return out.sub_(mean @ v)

    def gathered(r: Tensor) -> Tensor:
        """(f - mean(f))^T r, for r whose columns have mean 0"""
        return F.embedding_bag(
            row[order], r, by_latent, per_sample_weights=value[order], mode="sum", include_last_offset=True
        )

    diagonal = (squares * scale.square() - n * mean.square() + 1)[:, None]
    v = torch.zeros(m, x.shape[1], device=x.device)
    residual = gathered(x)
    goal = residual.norm(dim=0) * _TOLERANCE
    preconditioned = residual / diagonal
    direction = preconditioned.clone()
    rho = (residual * preconditioned).sum(0)
    for _ in range(_MOST_STEPS):
        if bool((residual.norm(dim=0) <= goal).all()):
            break
        product = gathered(decoded(direction)).add_(direction)
        # A column that is solved has nothing left to divide by.
        step = rho / (direction * product).sum(0).clamp_min(torch.finfo(x.dtype).tiny)
        v += step * direction
        residual -= step * product
        preconditioned = residual / diagonal
        new_rho = (residual * preconditioned).sum(0)
        direction = preconditioned + (new_rho / rho.clamp_min(torch.finfo(x.dtype).tiny)) * direction
        rho = new_rho
    return v * scale[:, None], mean / scale.clamp_min(torch.finfo(x.dtype).tiny)
