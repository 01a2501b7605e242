"""One training step: encode, BatchTopK, nested loss and aux loss, gradients, clip, Adam, unit decoder rows, counters.

The equations are in `nested_loss.py`; the work is in `selection.py` or, on a GPU, `batch_search.py` (encoder and
BatchTopK), `sparse.py` or `dense.py` (everything behind it), `dead.py` (aux entries) and `update.py` (weights).
Everything that is carried to the next step and decides anything is in `StepState`, so a run that saves and loads it
continues as if never interrupted (bit for bit on the CPU).
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from matryoshka.errors import UserError

from .backend import choose_backend, search_type
from .batch_search import search_batch
from .communicator import Communicator
from .dead import DeadBlock, list_dead, select_dead, select_listed
from .dead_capacity import DeadCapacity
from .dense import dense_gradients
from .gradients import Gradients
from .selection import TileEncoder
from .settings import StepSettings
from .sparse import prefix_errors, sparse_gradients
from .sparse_acts import SparseActs
from .state import StepState
from .update import apply, measure

BLOCK_LATENTS = 32
"""Times k_aux: so many dead latents are cheaper as a matrix of a row's activations of all of them, in fp32, than as a
list of the k_aux of a row (an fp32 FLOP is about 1/19 of a byte on a T4, 1/12 on an A100)."""

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
        self.low = search_type(settings.precision, self.device)
        self._group_ends = self._own_ends(settings.group_sizes)
        # CUDA: shapes that never depend on data, so no step waits for the device
        self._fixed_shapes = self.device.type == "cuda"
        self._encoder = TileEncoder(bf16=self.low == torch.bfloat16)
        self._dead_capacity = DeadCapacity()
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._bad_loss = torch.zeros((), device=self.device)

    @property
    def precision(self) -> str:
        """What the encoder's product is computed in here: fp32, bf16 or fp16."""
        names = {torch.bfloat16: "bf16"} | ({torch.float16: "fp16"} if self._fixed_shapes else {})
        return "fp32" if self.low is None else names.get(self.low, "fp32")

    def backend_for(self, batch: int) -> Literal["sparse", "dense"]:
        """The backend a batch of this many rows is trained with."""
        if self.settings.backend != "auto":
            return self.settings.backend
        d_sae, d_in, d_out = sum(self.settings.group_sizes), self.state.W_enc.shape[1], self.state.W_dec.shape[1]
        return choose_backend(
            self.device,
            low=self.low,
            d_in=d_in,
            d_out=d_out,
            d_sae=d_sae,
            k=self.settings.k,
            batch=batch,
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

    def _select(self, x: Tensor) -> tuple[SparseActs, SparseActs | DeadBlock | None, Tensor | float]:
        """BatchTopK's entries, the dead latents' entries, and the aux term's coefficient."""
        return self._largest(x), *self._select_dead(x)

    def _largest(self, x: Tensor) -> SparseActs:
        """This rank's part of the k * batch largest activations of the batch."""
        state, batch, fixed = self.state, x.shape[0], self._fixed_shapes
        # Activations that a product rounds to the same type need not be computed again, but to compare those of ranks.
        is_alone = self._ranks.row_parts == 1 and self._ranks.latents is None
        exact = not is_alone or self.backend_for(batch) == "sparse" or self._gradient_type is None

        def select(n: int) -> SparseActs:
            if fixed:
                return search_batch(x, state.W_enc, state.b_enc, n, low=self.low, exact=exact)
            return self._encoder.select(x, state.W_enc, state.b_enc, n)

        return self._ranks.largest(select, self.settings.k * batch * self._ranks.row_parts, batch, fixed_shapes=fixed)

    def _select_dead(self, x: Tensor) -> tuple[SparseActs | DeadBlock | None, Tensor | float]:
        """The dead latents' entries, and the aux term's coefficient."""
        settings, state, ranks, batch = self.settings, self.state, self._ranks, x.shape[0]
        if settings.auxk_coef == 0:
            return None, 0.0
        capacity = None
        if self._fixed_shapes:
            capacity = self._dead_capacity.at(
                state.tokens_since_fired,
                settings.dead_after_tokens,
                batch * ranks.row_parts,
                lambda count: -ranks.smallest(-count),
            )
            if not capacity:
                return None, 0.0
        is_dead = state.tokens_since_fired >= settings.dead_after_tokens
        n_dead = ranks.sum_over_latents(is_dead.sum())
        if capacity is not None:
            listed = list_dead(is_dead, capacity)
            coef = settings.auxk_coef * (n_dead / settings.k_aux).clamp_max(1.0)
        elif int(n_dead):
            listed = is_dead.nonzero().squeeze(1)
            coef = settings.auxk_coef * min(int(n_dead) / settings.k_aux, 1.0)
        else:
            return None, 0.0
        is_dense = self.backend_for(batch) == "dense"
        if capacity is None and not is_dense:
            own = select_dead(x, state.W_enc, state.b_enc, listed, settings.k_aux)
            return ranks.largest_of_rows(own, batch, settings.k_aux), coef
        low = self._gradient_type if is_dense else None
        own = select_listed(x, state.W_enc, state.b_enc, listed, settings.k_aux, low=low)
        own = ranks.largest_of_rows(own, batch, settings.k_aux)
        if is_dense or listed.shape[0] <= BLOCK_LATENTS * settings.k_aux:
            return DeadBlock.of(own, listed, batch, low), coef
        return replace(own, latents=listed.clamp_min(0)[own.latents.long()].int()), coef

    @property
    def _gradient_type(self) -> torch.dtype | None:
        """What the dense backend's operands are rounded to on a GPU. Gradients are too small for fp16."""
        return self.low if self._fixed_shapes and self.low == torch.bfloat16 else None

    def _gradients(
        self, x: Tensor, y: Tensor, kept: SparseActs, dead: SparseActs | DeadBlock | None, aux_coef: Tensor | float
    ) -> Gradients:
        settings, weights = self.settings, self.state.weights()
        if self.backend_for(x.shape[0]) == "dense":
            assert not isinstance(dead, SparseActs)
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
                low=self._gradient_type,
                join=self._ranks.sum_over_latents,
                residual_scatter=self._ranks.residual_scatter,
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
            residual_scatter=self._ranks.residual_scatter,
        )

    def _own_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many latents of each group `state` holds."""
        ends = [len(range(self._latents.start, end, self._latents.step)) for end in accumulate(sizes)]
        return tuple(b - a for a, b in pairwise((0, *ends)))

    def _own_ends(self, sizes: tuple[int, ...]) -> Tensor:
        """The same as prefix ends, int32 [n_groups]."""
        # filled one by one: a list would be copied, and the host would wait for the copy
        ends = torch.empty(len(sizes), dtype=torch.int32, device=self.device)
        for i, end in enumerate(accumulate(self._own_sizes(sizes))):
            ends[i].fill_(end)
        return ends

    def _sq_err(self, gradients: Gradients, x: Tensor, y: Tensor, kept: SparseActs) -> Tensor:
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

    def _count(self, kept: SparseActs, batch: int, finite: Tensor) -> Tensor:
        """Dead counters and threshold: the only place that changes them. Returns the number of entries kept here."""
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
        return positive.sum()

    def _times_fired(self, kept: SparseActs, positive: Tensor) -> Tensor:
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
        n_kept = self._ranks.sum_over_latents(self._ranks.sum_over_rows(n_kept))
        sq_err = sq_err.double()
        variance = self._ranks.total_scatter(y.double())
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
