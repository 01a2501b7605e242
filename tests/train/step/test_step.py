"""The whole step: update, threshold, counters, report, resume, refusal of non-finite batches."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka.errors import UserError
from train.step.step import NonFiniteLoss, StepReport, StepSettings, StepState, TrainStep

D_IN, D_OUT, D_SAE, BATCH = 12, 10, 48, 32
SETTINGS = StepSettings(
    group_sizes=(6, 10, 12, 20), k=5, k_aux=7, dead_after_tokens=100, target_variance=10.0, precision="fp32"
)
ADAM = {"betas": SETTINGS.betas, "eps": SETTINGS.adam_eps}


def make_state(seed: int = 0, *, skip: bool = False) -> StepState:
    g = torch.Generator().manual_seed(seed)
    b_enc = 0.1 * torch.randn(D_SAE, generator=g)
    b_enc[::3] -= 4.0  # a third of the latents starts out silent and soon counts as dead
    return StepState.create(
        W_enc=torch.randn(D_SAE, D_IN, generator=g) / D_IN**0.5,
        b_enc=b_enc,
        W_dec=torch.nn.functional.normalize(torch.randn(D_SAE, D_OUT, generator=g), dim=1),
        b_dec=torch.zeros(D_OUT),
        W_skip=torch.zeros(D_IN, D_OUT) if skip else None,
    )


def make_batches(n: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(D_IN, D_OUT, generator=g)
    xs = [torch.randn(BATCH, D_IN, generator=g) for _ in range(n)]
    return [(x, x @ truth / D_IN**0.5) for x in xs]


def snapshot(state: StepState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class SlowTwin:
    """One step as a textbook writes it: autograd, project, clip_grad_norm_, torch.optim.Adam, normalise."""

    def __init__(self, settings: StepSettings, state: StepState) -> None:
        self.settings = settings
        self.p = {n: t.clone().requires_grad_() for n, t in state.weights().items()}
        self.adam = torch.optim.Adam(list(self.p.values()), lr=1.0, foreach=False, **ADAM)
        self.threshold = 0.0
        self.since = torch.zeros(D_SAE, dtype=torch.int64)
        self.step = 0

    def __call__(self, x: Tensor, y: Tensor, lr: float) -> dict[str, float]:
        s, p = self.settings, self.p
        pre = x @ p["W_enc"].T + p["b_enc"]
        mask = torch.zeros(pre.numel(), dtype=torch.bool)
        mask[pre.flatten().sort(descending=True, stable=True).indices[: s.k * len(x)]] = True
        acts = torch.where(mask.view_as(pre), pre.relu(), 0.0)
        loss, y_hat = torch.zeros(()), y
        for i in range(len(s.group_sizes)):
            end = sum(s.group_sizes[: i + 1])
            y_hat = acts[:, :end] @ p["W_dec"][:end] + p["b_dec"] + (x @ p["W_skip"] if "W_skip" in p else 0)
            loss = loss + (y - y_hat).pow(2).sum(1).mean() / s.target_variance / len(s.group_sizes)
        dead = self.since >= s.dead_after_tokens
        if dead.any():
            residual = (y - y_hat).detach()
            n = min(s.k_aux, int(dead.sum()))
            top = torch.where(dead, pre, -torch.inf).topk(n, dim=1)
            recon = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ p["W_dec"]
            aux = (recon - residual).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()
            loss = loss + s.auxk_coef * min(int(dead.sum()) / s.k_aux, 1.0) * aux
        self.adam.zero_grad()
        loss.backward()
        W_dec = p["W_dec"]
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            norm = torch.nn.utils.clip_grad_norm_(list(p.values()), s.clip_norm)
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            fired = (acts > 0).any(0)
            self.since = torch.where(fired, 0, self.since + len(x))
            if fired.any() and self.step >= s.threshold_start_step:
                least, decay = float(acts[acts > 0].min()), s.threshold_decay
                self.threshold = decay * self.threshold + (1 - decay) * least if self.threshold else least
        self.step += 1
        return {"loss": float(loss.detach()), "grad_norm": float(norm), "l0": float((acts > 0).sum()) / len(x)}


def run(step: TrainStep, batches: list[tuple[Tensor, Tensor]], lr: float = 1e-2) -> list[StepReport]:
    reports = [step(x, y, lr=lr, log=True) for x, y in batches]
    return [report for report in reports if report is not None]


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("clip_norm", [0.05, 1e9])
def test_twenty_steps_equal_the_textbook_step(backend, skip, clip_norm):
    settings = replace(SETTINGS, backend=backend, clip_norm=clip_norm, threshold_start_step=3, threshold_decay=0.9)
    state = make_state(skip=skip)
    twin, step = SlowTwin(settings, state), TrainStep(settings, state, "cpu")
    saw_dead = False
    for x, y in make_batches(20):
        want = twin(x, y, 1e-2)
        report = step(x, y, lr=1e-2, log=True)
        assert report is not None
        saw_dead |= report.aux_loss > 0
        for name, value in want.items():
            assert getattr(report, name) == pytest.approx(value, rel=1e-4), name
        assert report.threshold == pytest.approx(twin.threshold, rel=1e-4)
        assert torch.equal(state.tokens_since_fired, twin.since)
        assert report.dead_share == pytest.approx(float((twin.since >= 100).double().mean()))
    assert saw_dead
    for name, tensor in state.weights().items():
        torch.testing.assert_close(tensor, twin.p[name].detach(), rtol=1e-3, atol=1e-5)


def test_clipping_bites_in_one_case_and_not_in_the_other():
    norms = [r.grad_norm for r in run(TrainStep(SETTINGS, make_state(), "cpu"), make_batches(20))]
    assert min(norms) > 0.05
    assert max(norms) < 1e9


def test_report_of_the_batch_matches_its_definition():
    settings = replace(SETTINGS, auxk_coef=0.0)
    state, (x, y) = make_state(), make_batches(1)[0]
    pre = x @ state.W_enc.T + state.b_enc
    least = pre.flatten().topk(SETTINGS.k * BATCH).values.min()
    acts = torch.where(pre >= least.clamp_min(1e-30), pre, 0.0)
    errors = [
        float((acts[:, :end] @ state.W_dec[:end] + state.b_dec - y).double().pow(2).sum()) for end in (6, 16, 28, 48)
    ]
    report = TrainStep(settings, state, "cpu")(x, y, lr=3e-4, log=True)
    assert report is not None
    total = float((y - y.mean(0)).double().pow(2).sum())
    assert report.fvu == pytest.approx([e / total for e in errors], rel=1e-5)
    assert report.l2_loss == pytest.approx(errors[-1] / BATCH, rel=1e-5)
    assert report.loss == pytest.approx(sum(errors) / 4 / BATCH / settings.target_variance, rel=1e-5)
    assert report.l0 == pytest.approx(float((acts > 0).sum()) / BATCH)
    assert report.lr == 3e-4
    assert report.aux_loss == 0
    assert TrainStep(settings, make_state(), "cpu")(x, y, lr=3e-4) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_resume_is_exact(tmp_path, backend, precision):
    settings = replace(SETTINGS, backend=backend, precision=precision)
    batches = make_batches(20)
    state = make_state()
    step = TrainStep(settings, state, "cpu")
    run(step, batches[:10])
    save_file(state.tensors(), tmp_path / "state.safetensors")
    whole = run(step, batches[10:])
    resumed_state = make_state(seed=7)
    resumed_state.load_tensors(load_file(tmp_path / "state.safetensors"))
    resumed = run(TrainStep(settings, resumed_state, "cpu"), batches[10:])
    assert any(report.aux_loss > 0 for report in whole)
    assert resumed == whole
    assert equal(resumed_state.tensors(), state.tensors())


def test_logging_changes_nothing():
    quiet, loud = make_state(), make_state()
    quiet_step, loud_step = TrainStep(SETTINGS, quiet, "cpu"), TrainStep(SETTINGS, loud, "cpu")
    for x, y in make_batches(8):
        quiet_step(x, y, lr=1e-2)
        loud_step(x, y, lr=1e-2, log=True)
    assert equal(quiet.tensors(), loud.tensors())


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_batch_raises_before_anything_changes(backend, where, value):
    state = make_state()
    step = TrainStep(replace(SETTINGS, backend=backend), state, "cpu")
    batches = make_batches(3)
    run(step, batches[:2])
    before = snapshot(state)
    x, y = (t.clone() for t in batches[2])
    (x if where == "x" else y)[3, 4] = value
    with pytest.raises(NonFiniteLoss) as caught:
        step(x, y, lr=1e-2)
    assert caught.value.step == 2
    assert isinstance(caught.value, ArithmeticError)
    assert equal(before, state.tensors())


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_cuda_path_masks_a_bad_batch_and_raises_at_the_next_log_step(backend):
    state = make_state()
    step = TrainStep(replace(SETTINGS, backend=backend), state, "cpu")
    step._fixed_shapes = True
    batches = make_batches(4)
    run(step, batches[:2])
    before = snapshot(state)
    step(batches[2][0], batches[2][1] * math.nan, lr=1e-2)
    assert equal(before, state.tensors())
    with pytest.raises(NonFiniteLoss) as caught:
        step(*batches[3], lr=1e-2, log=True)
    assert caught.value.step == 2
    assert math.isnan(caught.value.loss)


def test_cuda_path_trains_like_the_cpu_path():
    usual, fixed = make_state(), make_state()
    usual_step, fixed_step = TrainStep(SETTINGS, usual, "cpu"), TrainStep(SETTINGS, fixed, "cpu")
    fixed_step._fixed_shapes = True
    for a, b in zip(run(usual_step, make_batches(20)), run(fixed_step, make_batches(20)), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.aux_loss == pytest.approx(b.aux_loss, rel=1e-3)
        assert a.threshold == pytest.approx(b.threshold, rel=1e-4)
    assert torch.equal(usual.tokens_since_fired, fixed.tokens_since_fired)


def test_nothing_fires_leaves_the_threshold_and_ages_every_latent():
    state = make_state()
    state.b_enc.fill_(-100.0)
    step = TrainStep(SETTINGS, state, "cpu")
    x, y = make_batches(1)[0]
    report = step(x, y, lr=0.0, log=True)
    assert report is not None
    assert report.l0 == 0
    assert state.threshold == 0
    assert (state.tokens_since_fired == BATCH).all()


def test_decoder_rows_stay_of_unit_norm_and_both_backends_end_alike():
    fvus = []
    for backend in ("sparse", "dense"):
        state = make_state()
        reports = run(TrainStep(replace(SETTINGS, backend=backend), state, "cpu"), make_batches(200))
        torch.testing.assert_close(state.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=1e-6, atol=1e-6)
        per_prefix = [sum(values) / 20 for values in zip(*(r.fvu for r in reports[-20:]), strict=True)]
        assert per_prefix == sorted(per_prefix, reverse=True)
        fvus.append(per_prefix[-1])
    assert fvus[0] < 0.3
    assert fvus[0] == pytest.approx(fvus[1], abs=1e-2)


def test_load_tensors_refuses_what_does_not_fit_and_changes_nothing():
    state = make_state()
    before = snapshot(state)
    good = snapshot(make_state(seed=3))
    for bad in (
        {n: t for n, t in good.items() if n != "adam.exp_avg.W_enc"},
        {**good, "W_skip": torch.zeros(D_IN, D_OUT)},
        {**good, "W_dec": good["W_dec"].T.contiguous()},
        {**good, "step": good["step"].float()},
        {**good, "b_enc": good["b_enc"] * math.nan},
    ):
        with pytest.raises(UserError, match="Resume|resume"):
            state.load_tensors(bad)
        assert equal(before, state.tensors())
    state.load_tensors(good)
    assert equal(good, state.tensors())


def test_create_copies_and_refuses_wrong_weights():
    given = {n: t.clone() for n, t in make_state().weights().items()}
    state = StepState.create(**given)
    run(TrainStep(SETTINGS, state, "cpu"), make_batches(2))
    assert torch.equal(given["W_dec"], make_state().W_dec)
    with pytest.raises(UserError, match="rows"):
        StepState.create(**{**given, "W_enc": given["W_enc"].T})
    with pytest.raises(UserError, match="unit norm"):
        StepState.create(**{**given, "W_dec": 2 * given["W_dec"]})
    with pytest.raises(UserError, match="NaN"):
        StepState.create(**{**given, "b_enc": given["b_enc"] * math.nan})


def test_settings_and_shapes_are_checked_with_words():
    with pytest.raises(UserError, match="not prefix ends"):
        TrainStep(replace(SETTINGS, group_sizes=(6, 16, 28, 48)), make_state(), "cpu")
    with pytest.raises(UserError, match="one each"):
        replace(SETTINGS, group_weights=(1.0,))
    with pytest.raises(UserError, match="k is 49"):
        replace(SETTINGS, k=49)
    step = TrainStep(SETTINGS, make_state(), "cpu")
    with pytest.raises(UserError, match="float32"):
        step(torch.zeros(4, D_IN, dtype=torch.float64), torch.zeros(4, D_OUT), lr=1e-2)
    with pytest.raises(UserError, match="shapes"):
        step(torch.zeros(4, D_OUT), torch.zeros(4, D_IN), lr=1e-2)
