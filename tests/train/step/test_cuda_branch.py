"""Twenty steps of the branch that CUDA takes, run on the CPU, against twenty fp32 steps of the CPU's own.

Tolerances of every tensor of the state, relative to its norm:

    fp32; fp16 and bf16 that only search    1e-4: the same entries, added up in another order
    bf16 operands (dense)                   0.1 of moments, 0.05 of weights: each operand of each product is off by up
                                            to 1/512, and at this rate of 0.01 Adam moves weights of 0.2 by their half
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train.step.batch_search as batch_search
import train.step.dead as dead
import train.step.dead_capacity as dead_capacity
import train.step.step as step_module
from train.prefixes import sampled_sizes
from train.step.step import NonFiniteLoss, StepSettings, StepState, TrainStep

D_IN, D_OUT, D_SAE, BATCH, STEPS = 24, 20, 150, 64, 20
SETTINGS = StepSettings(
    group_sizes=(20, 30, 40, 60), k=9, k_aux=7, dead_after_tokens=10**9, target_variance=10.0, precision="fp32"
)
WAYS = {
    "fp32 sparse": ("fp32", "sparse", 1e-4, 1e-4),
    "fp32 dense": ("fp32", "dense", 1e-4, 1e-4),
    "bf16 sparse": ("bf16", "sparse", 1e-4, 1e-4),
    "bf16 dense": ("bf16", "dense", 0.1, 0.05),
    "fp16 sparse": ("fp16", "sparse", 1e-4, 1e-4),
    "fp16 dense": ("fp16", "dense", 1e-4, 1e-4),
}


def make_state(*, skip: bool = False, n_dead: int = 0, integers: bool = False) -> StepState:
    g = torch.Generator().manual_seed(0)
    state = StepState.create(
        W_enc=torch.randn(D_SAE, D_IN, generator=g) / D_IN**0.5,
        b_enc=0.1 * torch.randn(D_SAE, generator=g),
        W_dec=torch.nn.functional.normalize(torch.randn(D_SAE, D_OUT, generator=g), dim=1),
        b_dec=torch.randn(D_OUT, generator=g),
        W_skip=torch.zeros(D_IN, D_OUT) if skip else None,
    )
    killed = torch.randperm(D_SAE, generator=g)[:n_dead]
    state.tokens_since_fired[killed] = 10**9
    if n_dead < D_SAE:
        state.b_enc[killed] -= 3.0
    if integers:
        state.W_enc.mul_(3).round_()
        state.b_enc.zero_()
    return state


def make_batches(*, integers: bool = False) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    truth = torch.randn(D_IN, D_OUT, generator=g) / D_IN**0.5
    xs = [torch.randn(BATCH, D_IN, generator=g) for _ in range(STEPS)]
    return [(x.round() if integers else x, x @ truth) for x in xs]


def take(
    step: TrainStep, batches: list[tuple[Tensor, Tensor]], *, lr: float, sampled: bool, spoilt: int | None
) -> None:
    for i, (x, y) in enumerate(batches):
        if sampled:
            step.settings = replace(step.settings, sampled_sizes=sampled_sizes(D_SAE, 5, seed=3, step=i))
        if i == spoilt:
            y = y.clone()
            y[3, 4] = math.nan
        try:
            step(x, y, lr=lr)
        except NonFiniteLoss:
            assert i == spoilt


CASES: dict[str, Callable[[], tuple[StepState, bool]]] = {
    "none dead": lambda: (make_state(), False),
    "some dead": lambda: (make_state(n_dead=40), False),
    "fewer dead than k_aux": lambda: (make_state(n_dead=3), False),
    "all dead": lambda: (make_state(n_dead=D_SAE), False),
    "ties": lambda: (make_state(integers=True), True),
    "sampled prefixes": lambda: (make_state(n_dead=40), False),
    "a NaN batch": lambda: (make_state(n_dead=40), False),
    "skip": lambda: (make_state(skip=True, n_dead=40), False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_those_of_the_cpu(monkeypatch, case, way):
    if case != "ties":  # with equals in hundreds, a top-k on the CPU chooses among them as it likes
        monkeypatch.setattr(batch_search, "_MIN_SPARE", 64)
    precision, backend, rtol_moments, rtol_weights = WAYS[way]
    states = []
    for fixed in (False, True):
        state, integers = CASES[case]()
        settings = replace(SETTINGS, precision=precision if fixed else "fp32", backend=backend)
        step = TrainStep(settings, state, "cpu")
        step._fixed_shapes = fixed
        take(
            step,
            make_batches(integers=integers),
            lr=0.0 if integers else 1e-2,  # integers tie for as long as the weights stay what they are
            sampled=case == "sampled prefixes",
            spoilt=11 if case == "a NaN batch" else None,
        )
        states.append(state.tensors())
    usual, forced = states
    assert int(usual["step"]) == (STEPS - 1 if case == "a NaN batch" else STEPS)
    for name, tensor in usual.items():
        if tensor.dtype == torch.int64 and way != "bf16 dense":
            assert torch.equal(forced[name], tensor), name
        elif tensor.is_floating_point():
            rtol = rtol_moments if name.startswith("adam") else rtol_weights
            error = float((forced[name] - tensor).norm())
            assert error <= rtol * float(tensor.norm()) + 1e-9, (name, error / float(tensor.norm()))
    assert torch.equal(forced["step"], usual["step"])


def test_dead_latents_change_what_is_learned():
    """Or the cases with dead latents would show nothing."""
    learned = []
    for auxk_coef in (1 / 8, 0.0):
        state = make_state(n_dead=40)
        step = TrainStep(replace(SETTINGS, auxk_coef=auxk_coef), state, "cpu")
        step._fixed_shapes = True
        take(step, make_batches(), lr=1e-2, sampled=False, spoilt=None)
        learned.append(state.W_enc)
    assert not torch.allclose(*learned)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_latents_die_and_come_back_while_the_host_does_not_ask(monkeypatch, backend):
    monkeypatch.setattr(dead_capacity, "HORIZON", 8)
    monkeypatch.setattr(dead_capacity, "_LEAST", 1)
    monkeypatch.setattr(step_module, "BLOCK_LATENTS", 2)  # lists and blocks
    monkeypatch.setattr(dead, "WIDE_ELEMENTS", 9 * BATCH)
    monkeypatch.setattr(dead, "TILE_ELEMENTS", 11 * BATCH)
    settings = replace(SETTINGS, backend=backend, dead_after_tokens=3 * BATCH)
    states, counts = [], []
    for fixed in (False, True):
        state = make_state()
        step = TrainStep(settings, state, "cpu")
        step._fixed_shapes = fixed
        batches = make_batches()
        reports = [step(x * (1 + 2 * (i % 7 == 0)), y, lr=1e-2, log=True) for i, (x, y) in enumerate(batches)]
        counts.append([report.dead_share for report in reports if report is not None])
        states.append(state.tensors())
    assert counts[0] == counts[1]
    assert min(counts[0]) == 0 < max(counts[0])
    assert len(set(counts[0])) > 4
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_the_step_is_the_same_bits_when_it_is_taken_again():
    found = []
    for _ in range(2):
        state = make_state(n_dead=40)
        step = TrainStep(replace(SETTINGS, precision="bf16", backend="dense"), state, "cpu")
        step._fixed_shapes = True
        take(step, make_batches(), lr=1e-2, sampled=False, spoilt=None)
        found.append(state.tensors())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_a_cpu_takes_fp32_for_fp16():
    found = []
    for precision in ("fp32", "fp16"):
        state = make_state()
        step = TrainStep(replace(SETTINGS, precision=precision), state, "cpu")
        take(step, make_batches(), lr=1e-2, sampled=False, spoilt=None)
        assert step.precision == "fp32"
        found.append(state.tensors())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
