"""What a training step needs to know besides its state."""

import math
from dataclasses import dataclass
from typing import Literal

from matryoshka.errors import UserError

from .backend import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What a step needs to know besides its state. Raises UserError on values that cannot work."""

    group_sizes: tuple[int, ...]
    """Sizes of the disjoint groups; their sum is d_sae."""
    k: int
    """Mean latents per row: BatchTopK keeps the k * batch largest of the whole batch."""
    group_weights: tuple[float, ...] | None = None
    """w_i of each prefix's term; None is 1 / n_groups each."""
    sampled_sizes: tuple[int, ...] | None = None
    """Disjoint sizes whose prefixes are in this step's loss instead, with equal weights; those of group_sizes are still
    what is reported."""
    auxk_coef: float = 1 / 8
    k_aux: int
    """Pre-activations of dead latents per row that rebuild the residual."""
    dead_after_tokens: int
    """Rows without firing after which a latent counts as dead, judged at the start of a step."""
    target_variance: float
    """V_y: the total variance (summed over dimensions) of the targets as given to the step."""
    clip_norm: float = 1.0
    """Bound of the gradient's global norm, taken after the projection of the decoder's."""
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    threshold_decay: float = 0.999
    threshold_start_step: int = 0
    """First step whose smallest kept activation enters the threshold's average."""
    precision: Precision = "auto"
    """Of the encoder GEMM, which finds candidates that fp32 decides among; auto is what the hardware is fast in."""
    backend: Literal["auto", "sparse", "dense"] = "auto"

    def __post_init__(self) -> None:
        if not self.group_sizes or min(self.group_sizes) < 1:
            raise UserError(f"group_sizes is {self.group_sizes}; give at least one group, each of at least one latent.")
        if self.group_weights is not None and len(self.group_weights) != len(self.group_sizes):
            raise UserError(
                f"group_weights has {len(self.group_weights)} values for {len(self.group_sizes)} groups; give one each."
            )
        if self.sampled_sizes is not None and sum(self.sampled_sizes) != sum(self.group_sizes):
            raise UserError(f"sampled_sizes {self.sampled_sizes} do not sum to d_sae, as {self.group_sizes} do.")
        if not 1 <= self.k <= sum(self.group_sizes):
            raise UserError(f"k is {self.k}, expected 1 to d_sae = {sum(self.group_sizes)}.")
        if self.k_aux < 1 or self.dead_after_tokens < 1:
            raise UserError(
                f"k_aux is {self.k_aux} and dead_after_tokens is {self.dead_after_tokens}; both must be at least 1 "
                "(auxk_coef 0 turns the aux loss off)."
            )
        if not (math.isfinite(self.target_variance) and self.target_variance > 0):
            raise UserError(f"target_variance is {self.target_variance}; the targets must vary.")

    @property
    def loss_sizes(self) -> tuple[int, ...]:
        """Disjoint sizes of the groups whose prefixes are in the loss."""
        return self.group_sizes if self.sampled_sizes is None else self.sampled_sizes

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """w_i of each of those prefixes."""
        if self.sampled_sizes is None and self.group_weights is not None:
            return self.group_weights
        return (1 / len(self.loss_sizes),) * len(self.loss_sizes)
