"""One training step: encode, BatchTopK, nested loss and aux loss, gradients, clip, Adam, unit decoder rows, counters.

The equations are in `nested.py`; the work is in `selection.py` (encoder and BatchTopK), `sparse.py` or `dense.py`
(everything behind it), `dead.py` (aux entries) and `update.py` (weights). Everything that is carried to the next step
lies in `StepState`, so a run that saves and loads it goes on as if never interrupted (bit for bit on the CPU).
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from matryoshka.errors import UserError

from .backend import choose_backend, has_fast_bf16
from .communicator import Communicator
from .dead import select_dead, select_dead_fixed_shape
from .dense import dense_gradients
from .entries import Kept
from .gradients import Gradients
from .selection import TileEncoder, select_fixed_shape
from .sparse import prefix_errors, sparse_gradients
from .state import StepState
from .update import apply, measure

__all__ = ["NonFiniteLoss", "StepReport", "StepSettings", "StepState", "TrainStep"]


class NonFiniteLoss(ArithmeticError):
    """A batch gave a loss, a gradient norm or an input that is not finite. Nothing was changed by that batch."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"step {step}: the loss is {loss} (or its gradient or input is not finite); weights, optimizer, threshold "
            "and counters are as they were before it"
        )
        self.step = step
        self.loss = loss


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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the encoder GEMM; auto is bf16 where the hardware has it."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Numbers of one batch, before its update, as Python floats."""

    loss: float
    """What is optimised: sum_i w_i mean ||err_i||^2 / V_y, plus the aux term with its coefficient."""
    aux_loss: float
    """L_aux without its coefficient; 0 when nothing is dead."""
    fvu: tuple[float, ...]
    """Per prefix: sum ||err_i||^2 / sum ||y - mean(y)||^2 over this batch; an estimate of the split's."""
    l0: float
    dead_share: float
    """Share of latents dead after this batch."""
    threshold: float
    grad_norm: float
    """Global norm after the projection, before clipping."""
    lr: float
    l2_loss: float
    """mean ||err||^2 of the full width."""


class TrainStep:
    """Callable: one optimizer step on a batch. Owns `state`, which it moves to `device`.

    On the CPU a batch whose loss, gradient norm or input is not finite raises NonFiniteLoss at once. On CUDA no step
    waits for the device: such a batch changes nothing (every update is masked on the device) and the next step with
    log=True raises, or `check`.
    """

    def __init__(
        self,
        settings: StepSettings,
        state: StepState,
        device: torch.device | str,
        communicator: Communicator | None = None,
    ) -> None:
        """`communicator`: the ranks that take the step together, by default this process alone. `state` holds the
        latents that are this rank's."""
        self.settings, self.state, self.device = settings, state, torch.device(device)
        self._ranks = Communicator() if communicator is None else communicator
        state.to(self.device)
        d_sae = state.W_enc.shape[0]
        self._latents = range(sum(settings.group_sizes)) if self._ranks.latents is None else self._ranks.latents
        if len(self._latents) != d_sae:
            raise UserError(
                f"group_sizes {settings.group_sizes} sum to {sum(settings.group_sizes)}, but the weights have {d_sae} "
                "latents; group_sizes are disjoint sizes, not prefix ends."
            )
        auto = settings.precision == "auto"
        self.bf16 = settings.precision == "bf16" or (auto and has_fast_bf16(self.device))
        self._group_ends = self._own_ends(settings.group_sizes)
        # CUDA: shapes that never depend on data, so no step waits for the device
        self._fixed_shapes = self.device.type == "cuda"
        self._encoder = TileEncoder(self.bf16)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._bad_loss = torch.zeros((), device=self.device)

    def backend_for(self, batch: int) -> Literal["sparse", "dense"]:
        """The backend a batch of this many rows is trained with."""
        if self.settings.backend != "auto":
            return self.settings.backend
        d_sae, d_in, d_out = sum(self.settings.group_sizes), self.state.W_enc.shape[1], self.state.W_dec.shape[1]
        return choose_backend(
            self.device, bf16=self.bf16, d_in=d_in, d_out=d_out, d_sae=d_sae, k=self.settings.k, batch=batch
        )

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, *, lr: float, log: bool = False) -> StepReport | None:
        """Train on x [batch, d_in] (conditioned input) and y [batch, d_out] (scaled target), both fp32."""
        settings, state = self.settings, self.state
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if x.dtype != torch.float32 or y.dtype != torch.float32:
            raise UserError(f"The batch is {x.dtype} and {y.dtype}; a training step takes float32 rows.")
        wanted = (x.shape[0], state.W_enc.shape[1]), (x.shape[0], state.W_dec.shape[1])
        if (tuple(x.shape), tuple(y.shape)) != wanted:
            raise UserError(f"The batch has shapes {tuple(x.shape)} and {tuple(y.shape)}, expected {wanted}.")
        # Asked of all ranks before anything is: one that stopped alone would leave the others waiting for ever. Not of
        # the loss alone, which a NaN input can hide from, as no comparison selects it.
        finite = self._ranks.is_finite(x)
        if not self._fixed_shapes and not bool(finite):
            raise NonFiniteLoss(int(state.step), math.nan)
        kept, dead, aux_coef = self._select(x)
        gradients = self._ranks.gradients(self._gradients(x, y, kept, dead, aux_coef))
        # Measured with the weights that gave the loss: before the update.
        sq_err = self._sq_err(gradients, x, y, kept) if log else None
        measured = measure(gradients, state, over_ranks=self._ranks.sum_over_latents, common=self._ranks.common)
        loss = gradients.nested.loss
        finite = finite & torch.isfinite(loss) & torch.isfinite(measured.norm)
        skip = None
        if self._fixed_shapes:
            skip = (~finite).float()
            self._note_bad(finite, loss)
        elif not bool(finite):
            raise NonFiniteLoss(int(state.step), float(loss))
        n_kept = self._count(kept, x.shape[0], finite)
        apply(
            gradients,
            measured,
            state,
            lr=lr,
            clip_norm=settings.clip_norm,
            betas=settings.betas,
            eps=settings.adam_eps,
            skip=skip,
        )
        return None if sq_err is None else self._report(gradients, measured.norm, n_kept, sq_err, y, lr)

    def check(self) -> None:
        """Raise NonFiniteLoss when a batch was skipped since the last step that logged. Waits for the device."""
        if int(self._bad_step) >= 0:
            raise NonFiniteLoss(int(self._bad_step), float(self._bad_loss))

    def _select(self, x: Tensor) -> tuple[Kept, Kept | None, Tensor | float]:
        """BatchTopK's entries, the dead latents' entries, and the aux term's coefficient."""
        return self._largest(x), *self._select_dead(x)

    def _largest(self, x: Tensor) -> Kept:
        """This rank's part of the k * batch largest activations of the batch."""
        state, batch, fixed = self.state, x.shape[0], self._fixed_shapes

        def select(n: int) -> Kept:
            if fixed:
                return select_fixed_shape(x, state.W_enc, state.b_enc, n, bf16=self.bf16)
            return self._encoder.select(x, state.W_enc, state.b_enc, n)

        return self._ranks.largest(select, self.settings.k * batch * self._ranks.row_parts, batch, fixed_shapes=fixed)

    def _select_dead(self, x: Tensor) -> tuple[Kept | None, Tensor | float]:
        """The dead latents' entries, and the aux term's coefficient."""
        settings, state, batch = self.settings, self.state, x.shape[0]
        if settings.auxk_coef == 0:
            return None, 0.0
        is_dead = state.tokens_since_fired >= settings.dead_after_tokens
        n_dead = self._ranks.sum_over_latents(is_dead.sum())
        if self._fixed_shapes:
            own = select_dead_fixed_shape(x, state.W_enc, state.b_enc, is_dead, settings.k_aux)
            coef = settings.auxk_coef * (n_dead / settings.k_aux).clamp_max(1.0)
        elif int(n_dead):
            own = select_dead(x, state.W_enc, state.b_enc, is_dead.nonzero().squeeze(1), settings.k_aux)
            coef = settings.auxk_coef * min(int(n_dead) / settings.k_aux, 1.0)
        else:
            return None, 0.0
        return self._ranks.largest_of_rows(own, batch, settings.k_aux), coef

    def _gradients(self, x: Tensor, y: Tensor, kept: Kept, dead: Kept | None, aux_coef: Tensor | float) -> Gradients:
        settings, weights = self.settings, self.state.weights()
        if self.backend_for(x.shape[0]) == "dense":
            return dense_gradients(
                x,
                y,
                weights,
                kept,
                dead,
                group_sizes=self._own_sizes(settings.loss_sizes),
                group_weights=settings.loss_weights,
                target_variance=settings.target_variance,
                aux_coef=aux_coef,
                bf16=self.bf16 and self.device.type == "cuda",
                join=self._ranks.sum_over_latents,
                residual_spread=self._ranks.residual_spread,
            )
        return sparse_gradients(
            x,
            y,
            weights,
            kept,
            dead,
            prefix_ends=self._group_ends if settings.sampled_sizes is None else self._own_ends(settings.sampled_sizes),
            group_weights=settings.loss_weights,
            target_variance=settings.target_variance,
            aux_coef=aux_coef,
            join=self._ranks.sum_over_latents,
            residual_spread=self._ranks.residual_spread,
        )

    def _own_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many latents of each group `state` holds."""
        ends = [len(range(self._latents.start, end, self._latents.step)) for end in accumulate(sizes)]
        return tuple(b - a for a, b in pairwise((0, *ends)))

    def _own_ends(self, sizes: tuple[int, ...]) -> Tensor:
        """The same as prefix ends, int32 [n_groups]."""
        return torch.tensor(self._own_sizes(sizes), device=self.device).cumsum(0).int()

    def _sq_err(self, gradients: Gradients, x: Tensor, y: Tensor, kept: Kept) -> Tensor:
        """sum over the batch of ||y_hat_i - y||^2 for the prefixes of group_sizes, [n_groups]."""
        if self.settings.sampled_sizes is None:
            return gradients.nested.sq_err
        own = prefix_errors(x, y, self.state.weights(), kept, self._group_ends, join=self._ranks.sum_over_latents)
        return self._ranks.sum_over_rows(own)

    def _note_bad(self, finite: Tensor, loss: Tensor) -> None:
        """Remember the first bad batch on the device, for the next log step to raise."""
        first = ~finite & (self._bad_step < 0)
        self._bad_loss = torch.where(first, loss, self._bad_loss)
        self._bad_step = torch.where(first, self.state.step, self._bad_step)

    def _count(self, kept: Kept, batch: int, finite: Tensor) -> Tensor:
        """Dead counters and threshold: the only place that changes them. Returns the number of kept entries."""
        settings, state, ranks = self.settings, self.state, self._ranks
        positive = kept.acts > 0
        fired = ranks.sum_over_rows(self._times_fired(kept, positive)) > 0
        since = torch.where(fired, 0, state.tokens_since_fired + batch * ranks.row_parts)
        state.tokens_since_fired.copy_(torch.where(finite, since, state.tokens_since_fired))
        smallest = ranks.smallest(self._smallest(kept.acts, positive))
        decay = settings.threshold_decay
        average = torch.where(state.threshold > 0, decay * state.threshold + (1 - decay) * smallest, smallest)
        moves = finite & torch.isfinite(smallest) & (state.step >= settings.threshold_start_step)
        state.threshold.copy_(torch.where(moves, average, state.threshold))
        return ranks.sum_over_latents(ranks.sum_over_rows(positive.sum()))

    def _times_fired(self, kept: Kept, positive: Tensor) -> Tensor:
        """In how many of the own rows each of the own latents is active, fp32 [d_sae]."""
        return torch.zeros(self.state.W_enc.shape[0], device=self.device).index_add_(0, kept.latents, positive.float())

    def _smallest(self, acts: Tensor, positive: Tensor) -> Tensor:
        """The smallest activation kept here, 0-d; infinite when nothing is."""
        if not acts.numel():
            return torch.full((), torch.inf, device=self.device)
        return acts.masked_fill(~positive, torch.inf).min()

    def _dead_share(self) -> float:
        n_dead = (self.state.tokens_since_fired >= self.settings.dead_after_tokens).sum()
        return float(self._ranks.sum_over_latents(n_dead)) / sum(self.settings.group_sizes)

    def _report(
        self, gradients: Gradients, norm: Tensor, n_kept: Tensor, sq_err: Tensor, y: Tensor, lr: float
    ) -> StepReport:
        batch = y.shape[0] * self._ranks.row_parts
        self.check()
        sq_err = sq_err.double()
        variance = self._ranks.spread(y.double())
        return StepReport(
            loss=float(gradients.nested.loss),
            aux_loss=float(gradients.nested.aux_loss),
            fvu=tuple((sq_err / variance).tolist()),
            l0=float(n_kept) / batch,
            dead_share=self._dead_share(),
            threshold=float(self.state.threshold),
            grad_norm=float(norm),
            lr=lr,
            l2_loss=float(sq_err[-1]) / batch,
        )
