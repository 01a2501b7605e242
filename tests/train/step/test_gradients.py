"""Every backend's gradients against dense autograd over a slow, obvious twin of the loss."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train.step.step import StepSettings, StepState, TrainStep

D_IN, D_OUT, D_SAE, BATCH = 12, 10, 48, 32
SETTINGS = StepSettings(
    group_sizes=(6, 10, 12, 20),
    k=5,
    k_aux=7,
    dead_after_tokens=1000,
    target_variance=3.7,
    precision="fp32",
    backend="sparse",
)


def make_state(seed: int = 0, *, skip: bool = False, d_sae: int = D_SAE) -> StepState:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, D_OUT, generator=g), dim=1)
    return StepState.create(
        W_enc=torch.randn(d_sae, D_IN, generator=g) / D_IN**0.5,
        b_enc=0.1 * torch.randn(d_sae, generator=g),
        W_dec=W_dec,
        b_dec=torch.randn(D_OUT, generator=g),
        W_skip=0.1 * torch.randn(D_IN, D_OUT, generator=g) if skip else None,
    )


def make_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, D_IN, generator=g), torch.randn(BATCH, D_OUT, generator=g)


def reference(
    settings: StepSettings, state: StepState, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, aux loss and gradients in float64: every prefix decoded from zero, by autograd."""
    p = {n: t.detach().double().requires_grad_() for n, t in state.weights().items()}
    x, y = x.double(), y.double()
    pre = x @ p["W_enc"].T + p["b_enc"]
    # selection looks at the fp32 values, which decide ties
    pre32 = torch.addmm(state.b_enc, x.float(), state.W_enc.T)
    order = pre32.flatten().sort(descending=True, stable=True).indices[: settings.k * x.shape[0]]
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[order] = True
    acts = torch.where(mask.view_as(pre), pre.relu(), 0.0)
    offset = p["b_dec"] + (x @ p["W_skip"] if "W_skip" in p else 0.0)
    sizes = settings.sampled_sizes or settings.group_sizes
    n_groups = len(sizes)
    weights = settings.group_weights or [1 / n_groups] * n_groups
    loss, y_hat = torch.zeros((), dtype=torch.float64), y
    for i in range(n_groups):
        end = sum(sizes[: i + 1])
        y_hat = acts[:, :end] @ p["W_dec"][:end] + offset
        loss = loss + weights[i] * (y - y_hat).pow(2).sum(1).mean() / settings.target_variance
    aux = torch.zeros((), dtype=torch.float64)
    dead = state.tokens_since_fired >= settings.dead_after_tokens
    if dead.any() and settings.auxk_coef:
        residual = (y - y_hat).detach()
        n = min(settings.k_aux, int(dead.sum()))
        top = torch.where(dead, pre, -torch.inf).topk(n, dim=1)
        recon = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ p["W_dec"]
        variance = (residual - residual.mean(0)).pow(2).sum(1).mean()
        aux = (recon - residual).pow(2).sum(1).mean() / variance
        loss = loss + settings.auxk_coef * min(int(dead.sum()) / settings.k_aux, 1.0) * aux
    loss.backward()
    return loss.detach(), aux.detach(), {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in p.items()}


def ours(step: TrainStep, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        gradients = step._gradients(x, y, *step._select(x))
    d_sae = step.state.W_enc.shape[0]
    whole = {name: gradients.rows(name, 0, d_sae) for name in ("W_enc", "W_dec")}
    # asked for in pieces, the rows are the same bits
    for name, matrix in whole.items():
        pieces = [gradients.rows(name, 0, 7), gradients.rows(name, 7, d_sae)]
        assert torch.equal(torch.cat(pieces), matrix)
    dot = (whole["W_dec"].double() * step.state.W_dec.double()).sum(1)
    torch.testing.assert_close(gradients.decoder_dot.double(), dot, rtol=1e-4, atol=1e-6)
    return gradients.nested.loss, gradients.nested.aux_loss, {**gradients.small, **whole}


def check(settings: StepSettings, state: StepState, x: Tensor, y: Tensor, *, fixed_shapes: bool = False) -> None:
    step = TrainStep(settings, state, "cpu")
    step._fixed_shapes = fixed_shapes
    want_loss, want_aux, want = reference(settings, state, x, y)
    for _ in range(2):  # the second time with the bound that the first left behind
        loss, aux, got = ours(step, x, y)
        torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(aux.double(), want_aux, rtol=1e-5, atol=0)
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            error = (gradient.double() - want[name]).norm()
            assert error <= 1e-5 * want[name].norm(), f"{name}: {error / want[name].norm()}"


def kill(state: StepState, n_dead: int) -> StepState:
    g = torch.Generator().manual_seed(5)
    state.tokens_since_fired[torch.randperm(D_SAE, generator=g)[:n_dead]] = 1000
    return state


def with_ties() -> StepState:
    """Small integer weights: with a rounded batch every pre-activation is a small integer, exactly."""
    state = make_state(2)
    state.W_enc.mul_(3).round_()
    state.b_enc.zero_()
    return state


def batch_for(case: str) -> tuple[Tensor, Tensor]:
    x, y = make_batch()
    return (x.round() if "ties" in case else x), y


def all_negative() -> StepState:
    state = make_state(3)
    state.b_enc.fill_(-100.0)
    return state


def firing_in_one_group() -> StepState:
    state = make_state(4)
    state.b_enc[:6] = -100.0
    state.b_enc[16:] = -100.0
    return state


CASES = {
    "plain": (SETTINGS, lambda: make_state()),
    "skip": (SETTINGS, lambda: make_state(skip=True)),
    "aux": (SETTINGS, lambda: kill(make_state(), 20)),
    "aux, fewer dead than k_aux": (SETTINGS, lambda: kill(make_state(), 3)),
    "aux and skip": (replace(SETTINGS, auxk_coef=0.7), lambda: kill(make_state(skip=True), 20)),
    "aux off": (replace(SETTINGS, auxk_coef=0.0), lambda: kill(make_state(), 20)),
    "all dead": (SETTINGS, lambda: kill(make_state(), D_SAE)),
    "weights per group": (replace(SETTINGS, group_weights=(0.1, 0.0, 2.0, 0.4)), lambda: make_state()),
    "one group": (replace(SETTINGS, group_sizes=(48,)), lambda: make_state()),
    "eight groups": (replace(SETTINGS, group_sizes=(1, 2, 3, 4, 5, 6, 7, 20)), lambda: make_state()),
    "k leaves groups empty": (replace(SETTINGS, k=1, group_sizes=(1, 1, 1, 45)), lambda: make_state()),
    "one group fires": (SETTINGS, firing_in_one_group),
    "ties at the threshold": (SETTINGS, with_ties),
    "all negative": (SETTINGS, all_negative),
    "all negative, all dead": (SETTINGS, lambda: kill(all_negative(), D_SAE)),
    "sampled prefixes": (replace(SETTINGS, sampled_sizes=(1, 4, 22, 2, 19)), lambda: make_state()),
    "sampled prefixes, aux and skip": (
        replace(SETTINGS, sampled_sizes=(31, 17), auxk_coef=0.7),
        lambda: kill(make_state(skip=True), 20),
    ),
    "k is d_sae": (replace(SETTINGS, k=48), lambda: make_state()),
}


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_dense_autograd(case, backend):
    settings, state = CASES[case]
    check(replace(settings, backend=backend), state(), *batch_for(case))


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "ties at the threshold"])
def test_fixed_shape_path_of_cuda_gives_the_same_gradients(case, backend):
    settings, state = CASES[case]
    check(replace(settings, backend=backend), state(), *batch_for(case), fixed_shapes=True)


def test_conditioned_input_gives_the_gradients_of_the_conditioned_rows():
    g = torch.Generator().manual_seed(9)
    raw = 40 * torch.randn(BATCH, D_IN, generator=g) + 17
    x = (raw - raw.mean(0)) / raw.std(0)
    check(SETTINGS, make_state(), x, make_batch()[1])


def test_the_tie_case_really_ties_at_the_threshold():
    state, (x, _) = with_ties(), batch_for("ties at the threshold")
    values = torch.addmm(state.b_enc, x, state.W_enc.T).flatten().sort(descending=True).values
    n = SETTINGS.k * BATCH
    assert values[n - 1] == values[n]
    assert values[n - 1] > 0


def test_prefix_term_has_no_gradient_beyond_its_prefix():
    settings = replace(SETTINGS, group_weights=(0.0, 1.0, 0.0, 0.0))
    _, _, got = ours(TrainStep(settings, make_state(), "cpu"), *make_batch())
    for name in ("W_enc", "W_dec", "b_enc"):
        assert not got[name][16:].any()
        assert got[name][:16].any()


def test_group_sizes_change_loss_and_gradients():
    x, y = make_batch()
    loss, _, got = ours(TrainStep(SETTINGS, make_state(), "cpu"), x, y)
    other_loss, _, other = ours(TrainStep(replace(SETTINGS, group_sizes=(20, 12, 10, 6)), make_state(), "cpu"), x, y)
    assert loss != other_loss
    assert not torch.equal(got["W_dec"], other["W_dec"])
