"""A run's start, its steps and a step that logs, on fake tensors: what of train's CUDA branch the ledger counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.ledger.counting import Counter, Operation, by_file
from benchmarks.ledger.fake_cuda import fake_device
from benchmarks.ledger.recipes import Recipe
from matryoshka.norms import Norm
from train.batches.conditioning import Conditioning
from train.batches.device_batch import Rows
from train.batches.stream import Batch
from train.memory import member_estimate
from train.prefixes import sampled_sizes
from train.step.backend import Backend, Precision
from train.step.initial import initial_state
from train.step.step import StepSettings, TrainStep

PHASES = ("conditioning", "select", "dead latents", "gradients", "norm", "update", "counters")
_phase = by_file(
    {
        "device_batch": "conditioning",
        "conditioning": "conditioning",
        "batch_search": "select",
        "dead": "dead latents",
        "dead_capacity": "dead latents",
        "sparse": "gradients",
        "dense": "gradients",
        "nested_loss": "gradients",
    },
    {"measure": "norm", "apply": "update"},
    otherwise="counters",
)


@dataclass(frozen=True, slots=True)
class Count:
    """What one way of training a recipe takes. Bytes are those of the device."""

    recipe: Recipe
    precision: str
    backend: str
    step: Sequence[Operation]
    """A step that does not log, with the conditioning of its batch."""
    log_step: Sequence[Operation]
    start_peak: int
    step_peak: int
    estimated: int
    """What `train` says before it starts."""

    def of(self, *phases: str) -> list[Operation]:
        """The operations of these phases of the step."""
        return [operation for operation in self.step if operation.phase in phases]

    @property
    def training(self) -> list[Operation]:
        """The step without the conditioning of the batch, which the runs of a fleet share."""
        return [operation for operation in self.step if operation.phase != "conditioning"]


def count(
    recipe: Recipe, *, precision: Precision, backend: Backend | Literal["auto"] = "auto", dead_share: float = 0.0
) -> Count:
    """Train `recipe` on a fake GPU for three steps, of which the second is counted and the third logs."""
    # What the host reads where it waits for the device: checks pass, no batch was bad, and so many latents are dead.
    numbers = {bool: True, int: round(dead_share * recipe.d_sae), float: 0.0}
    config = recipe.config.model_copy(update={"precision": precision, "backend": backend})
    plan, d = recipe.plan(), recipe.d
    with fake_device() as device, Counter(device, _phase, numbers) as counter:
        step, conditioning = start(recipe, device, precision=precision, backend=backend)
        start_peak = counter.peak
        operations: list[list[Operation]] = []
        peaks: list[int] = []
        for log in (False, False, True):
            counter.restart()
            if config.sampled_prefixes is not None:
                sizes = sampled_sizes(plan.d_sae, config.sampled_prefixes, seed=0, step=len(operations))
                step.settings = replace(step.settings, sampled_sizes=sizes)
            batch = torch.empty(config.batch_tokens, d, dtype=torch.bfloat16)
            take(step, conditioning, Batch(source=batch, target=batch), log=log)
            operations.append(counter.operations)
            peaks.append(counter.peak)
            numbers[int] = -1
    need = member_estimate(config, plan, d_in=d, d_out=d, device=device)
    return Count(
        recipe=recipe,
        precision=precision,
        backend=step.backend_for(config.batch_tokens),
        step=operations[1],
        log_step=operations[2],
        start_peak=start_peak,
        step_peak=max(peaks),
        estimated=need.held + need.step,
    )


def count_for_real(
    recipe: Recipe, *, precision: Precision, backend: Backend | Literal["auto"], dead_share: float = 0.0
) -> list[Operation]:
    """The operations of the CUDA branch's second step, run on the CPU with numbers: for sizes that a test can take."""
    with Counter(torch.device("cpu"), _phase) as counter:
        step, conditioning = start(recipe, torch.device("cpu"), precision=precision, backend=backend)
        step._fixed_shapes = True
        step.state.tokens_since_fired[: round(dead_share * recipe.d_sae)] = 10**9
        g = torch.Generator().manual_seed(1)
        for _ in range(2):
            rows = torch.randn(2, recipe.config.batch_tokens, recipe.d, generator=g).bfloat16()
            counter.restart()
            take(step, conditioning, Batch(source=rows[0], target=rows[1]), log=False)
        return counter.operations


def start(
    recipe: Recipe, device: torch.device, *, precision: Precision, backend: Backend | Literal["auto"]
) -> tuple[TrainStep, Conditioning]:
    """A run of `recipe` before its first step, with a norm and latents that start from pairs."""
    config, plan, d = recipe.config, recipe.plan(), recipe.d
    conditioning = Conditioning(
        convention="normalized",
        source_site="resid_mid",
        norm=Norm(kind="rms", eps=1e-6, gain=torch.ones(d, device=device), bias=None),
        mu_x=torch.zeros(d, device=device),
        s_x=torch.ones(d, device=device),
        mean_y=torch.zeros(d, device=device),
        s_y=1.0,
        target_variance=float(d),
    )
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, plan.d_sae, d, generator=generator).bfloat16()
    state = initial_state(
        d_sae=plan.d_sae,
        source=first[0],
        target=first[1],
        conditioning=conditioning,
        init=config.init,
        skip=config.skip,
        generator=generator,
    )
    settings = StepSettings(
        group_sizes=plan.group_sizes,
        k=config.k,
        auxk_coef=config.auxk_coef,
        k_aux=plan.k_aux,
        dead_after_tokens=plan.dead_after_tokens,
        target_variance=float(d),
        precision=precision,
        backend=backend,
    )
    return TrainStep(settings, state, device), conditioning


def take(step: TrainStep, conditioning: Conditioning, batch: Batch, *, log: bool) -> None:
    """Bring a batch to the device and train on it."""
    rows = Rows(batch, step.device)
    step(rows.x(conditioning), rows.y(conditioning), lr=1e-3, log=log)
