"""From a stored row to what the training step sees, and back into the weights that are saved.

    x_hat = (T(x) - mu_x) / s_x        y_hat = y / s_y

T is the input convention. mu_x and s_x come from the statistics of the shard set: `none` scales by one number,
`centre` subtracts the mean and scales by one number, `standardise` scales each dimension by its own deviation.
s_y makes the mean variance of a target dimension 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.norms import Norm, apply_convention
from matryoshka.shards import ShardSet
from matryoshka.sites import input_conventions

_MIN_DEVIATION = 1e-6
"""Of the mean deviation: a constant dimension is not blown up."""


@dataclass(frozen=True, eq=False, slots=True)
class Conditioning:
    """The fixed maps of one run. Tensors are float32 on the training device."""

    convention: str
    source_site: str
    norm: Norm | None
    mu_x: Tensor
    """[d_in]"""
    s_x: Tensor
    """[d_in]"""
    mean_y: Tensor
    """[d_out], unscaled"""
    s_y: float
    target_variance: float
    """V_y: total variance of the scaled targets."""

    @classmethod
    def from_shards(cls, shards: ShardSet, convention: str, condition: str, device: torch.device) -> Conditioning:
        """Read the statistics that this input convention needs. Raises UserError when the set cannot give it."""
        site = shards.manifest.source.site
        conventions = input_conventions(site)
        if convention not in conventions:
            raise UserError(
                f"input {convention!r} does not exist for the source {site}; choose {', '.join(conventions)}"
            )
        if convention != site and shards.norm is None:
            raise UserError(f"{shards.path} stores no norm of its model, so input can only be {site}")
        stats = shards.stats({site: "source", "normalized": "normalized"}.get(convention, "with_gain"))
        mean, variance = stats.mean, stats.variance
        if condition == "none":
            scale = (variance + mean.square()).mean().sqrt().expand_as(mean)
            mean = torch.zeros_like(mean)
        elif condition == "centre":
            scale = variance.mean().sqrt().expand_as(mean)
        else:
            scale = variance.sqrt().clamp_min(_MIN_DEVIATION * float(variance.mean().sqrt()))
        if not bool((scale > 0).all()):
            raise UserError(f"the source activations of {shards.path} do not vary: there is nothing to learn from")
        target = shards.stats("target")
        s_y = float(target.variance.mean().sqrt())
        if not s_y > 0:
            raise UserError(f"the target activations of {shards.path} do not vary: there is nothing to predict")
        norm = shards.norm
        if norm is not None:
            bias = None if norm.bias is None else norm.bias.to(device)
            norm = Norm(kind=norm.kind, eps=norm.eps, gain=norm.gain.to(device), bias=bias)
        return cls(
            convention=convention,
            source_site=site,
            norm=norm,
            mu_x=mean.float().to(device),
            s_x=scale.float().to(device),
            mean_y=target.mean.float().to(device),
            s_y=s_y,
            target_variance=float(target.variance.sum()) / s_y**2,
        )

    def input(self, source: Tensor) -> Tensor:
        """x_hat of stored source rows [rows, d_in], float32."""
        x = apply_convention(source, self.convention, source_site=self.source_site, norm=self.norm)
        return (x - self.mu_x) / self.s_x

    def target(self, target: Tensor) -> Tensor:
        """y_hat of stored target rows [rows, d_out], float32."""
        return target.float() / self.s_y

    def fold(self, weights: dict[str, Tensor], threshold: Tensor) -> dict[str, Tensor]:
        """Weights for raw inputs of the convention and raw targets, in the names and shapes of a saved transcoder.

        `weights`: W_enc [d_sae, d_in] rows, b_enc, W_dec [d_sae, d_out] unit rows, b_dec, maybe W_skip [d_in, d_out].
        With z = x_hat @ W_enc.T + b_enc, s_y * relu(z) = relu(s_y * z): the output scale goes into the encoder and the
        threshold, so that the decoder keeps unit rows. Computed in float64.
        """
        # One matrix at a time in float64: a checkpoint is written while training needs its memory.
        mu_x, s_x = self.mu_x.cpu().double(), self.s_x.cpu().double()
        W_enc = weights["W_enc"].detach().cpu().to(torch.float64, copy=True).T.div_(s_x[:, None])
        b_enc = weights["b_enc"].detach().cpu().double() - mu_x @ W_enc
        b_dec = weights["b_dec"].detach().cpu().double() * self.s_y
        folded = {
            "W_enc": _saved(W_enc.mul_(self.s_y)),
            "b_enc": _saved(b_enc * self.s_y),
            "W_dec": _saved(weights["W_dec"].detach().cpu()),
            "threshold": _saved(threshold.detach().cpu().double().expand(len(b_enc)) * self.s_y),
        }
        del W_enc
        if "W_skip" in weights:
            W_skip = weights["W_skip"].detach().cpu().double() / s_x[:, None] * self.s_y
            b_dec = b_dec - mu_x @ W_skip
            folded["W_skip"] = _saved(W_skip)
        return folded | {"b_dec": _saved(b_dec)}


def _saved(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
