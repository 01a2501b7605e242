"""The contestants of train_step.py: one problem, its data, and the ways to take a training step on it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from train.step.step import StepSettings, StepState, TrainStep

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem size; groups double in size, as 1/16, 1/8, ... of d_sae."""

    batch: int = 2048
    d: int = 640
    d_sae: int = 10240
    k: int = 64
    n_groups: int = 4

    @property
    def group_sizes(self) -> tuple[int, ...]:
        sizes: list[int] = []
        left = self.d_sae
        for _ in range(self.n_groups - 1):
            sizes.insert(0, left // 2)
            left -= left // 2
        return (left, *sizes)

    def settings(self, **changes) -> StepSettings:
        return StepSettings(
            **{
                "group_sizes": self.group_sizes,
                "k": self.k,
                "k_aux": self.d // 2,
                "dead_after_tokens": 1 << 40,
                "target_variance": float(self.d),
                **changes,
            }
        )


@dataclass(frozen=True)
class Data:
    """Seeded weights and batches for one shape: rows are sparse mixtures of planted directions plus noise."""

    W: Tensor
    batches: list[tuple[Tensor, Tensor]]


def make_data(shape: Shape, n_batches: int = 4) -> Data:
    g = torch.Generator().manual_seed(0)
    W = F.normalize(torch.randn(shape.d_sae, shape.d, generator=g), dim=1)
    n_true = 2 * shape.d
    source = F.normalize(torch.randn(n_true, shape.d, generator=g), dim=1)
    target = F.normalize(torch.randn(n_true, shape.d, generator=g), dim=1)
    batches = []
    for _ in range(n_batches):
        code = torch.rand(shape.batch, n_true, generator=g)
        code = torch.where(code < 0.03, 1 + torch.rand(code.shape, generator=g), 0.0)
        x, y = code @ source, code @ target
        noise = 0.3 * torch.randn(x.shape, generator=g)
        batches.append(((x - x.mean(0)) / x.std() + noise, (y - y.mean(0)) / y.std()))
    return Data(W, batches)


def make_floor(shape: Shape, data: Data) -> Step:
    """The bare encoder GEMM and fused Adam: nothing that trains this model in fp32 can do less."""
    out, b_enc, x = torch.empty(shape.batch, shape.d_sae), torch.zeros(shape.d_sae), data.batches[0][0]
    params = [data.W.clone(), data.W.clone()]
    grads = [torch.full_like(data.W, 1e-4) for _ in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(data.W) for _ in params] for _ in range(2))

    def floor() -> None:
        torch.addmm(b_enc, x, data.W.t(), out=out)
        steps = [torch.tensor(5.0) for _ in params]
        adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=1e-4,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    return floor


def make_ours(shape: Shape, data: Data, *, dead: bool = False, **changes) -> Step:
    state = StepState.create(W_enc=data.W, b_enc=torch.zeros(shape.d_sae), W_dec=data.W, b_dec=torch.zeros(shape.d))
    step = TrainStep(shape.settings(**changes), state, "cpu")
    turn = 0

    def ours() -> None:
        nonlocal turn
        if dead:
            state.tokens_since_fired[::2] = 1 << 41
        step(*data.batches[turn % len(data.batches)], lr=1e-4)
        turn += 1

    return ours


def make_autograd(shape: Shape, data: Data, *, cumulative: bool) -> Step:
    """The step as it is usually written, whole: dense autograd, projection, clip, fused Adam, renormalisation.

    cumulative: each group decoded once and summed up; otherwise every prefix decoded again from latent 0.
    """
    params = [torch.nn.Parameter(t.clone()) for t in (data.W, torch.zeros(shape.d_sae), data.W, torch.zeros(shape.d))]
    W_enc, b_enc, W_dec, b_dec = params
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)
    turn = 0

    def autograd() -> None:
        nonlocal turn
        x, y = data.batches[turn % len(data.batches)]
        turn += 1
        acts = F.relu(x @ W_enc.t() + b_enc)
        top = acts.flatten().topk(shape.k * shape.batch, sorted=False)
        acts = torch.zeros(acts.numel()).scatter_(0, top.indices, top.values).view(acts.shape)
        loss, recon, start = torch.zeros(()), b_dec.expand(shape.batch, shape.d), 0
        for size in shape.group_sizes:
            end = start + size
            # a running sum of groups, or every prefix again from latent 0
            first, onto = (start, recon) if cumulative else (0, b_dec)
            recon = onto + acts[:, first:end] @ W_dec[first:end]
            loss = loss + (recon - y).pow(2).sum(1).mean() / shape.d / shape.n_groups
            start = end
        optimizer.zero_grad()
        loss.backward()
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return autograd


def make_saelens(shape: Shape, data: Data) -> Step | None:
    """SAELens' own Matryoshka BatchTopK forward pass and the lines of its SAETrainer._train_step around it.

    It is an autoencoder (x is its own target), which costs the same as a transcoder of d_in = d_out; its bookkeeping of
    firing counts is left out, in its favour.
    """
    logging.disable(logging.WARNING)
    try:
        from sae_lens.saes.matryoshka_batchtopk_sae import (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
        )
        from sae_lens.saes.sae import TrainStepInput
    except ImportError:
        return None
    ends = [sum(shape.group_sizes[: i + 1]) for i in range(shape.n_groups)]
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.d_sae, k=shape.k, matryoshka_widths=ends, dtype="float32", device="cpu"
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(data.W.t())
        sae.W_dec.copy_(data.W)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, betas=(0.9, 0.999))
    no_dead = torch.zeros(shape.d_sae, dtype=torch.bool)
    turn = 0

    def saelens() -> None:
        nonlocal turn
        x = data.batches[turn % len(data.batches)][0]
        turn += 1
        step_input = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=no_dead, n_training_steps=turn, is_logging_step=False
        )
        sae.training_forward_pass(step_input).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return saelens


def make_gemm(shape: Shape, data: Data, dtype: torch.dtype) -> Step:
    x, W, b = data.batches[0][0].to(dtype), data.W.to(dtype), torch.zeros(shape.d_sae, dtype=dtype)
    out = torch.empty(shape.batch, shape.d_sae, dtype=dtype)
    return lambda: torch.addmm(b, x, W.t(), out=out)
