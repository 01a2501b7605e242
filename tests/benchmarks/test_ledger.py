"""The ledger of the CUDA branch: its counts are those of a run with numbers, and what a change must not break."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import replace

import pytest
import torch

from benchmarks.ledger.counting import Counter
from benchmarks.ledger.fake_cuda import fake_device
from benchmarks.ledger.fake_step import Count, count, count_for_real
from benchmarks.ledger.machines import MACHINES
from benchmarks.ledger.recipes import Recipe, recipes
from train.step.backend import choose_backend

RECIPES = {recipe.name: recipe for recipe in recipes()}
CASES = {"dense": "bf16", "sparse": "fp16", "auto": "bf16"}
KERNELS = {"dense": 260, "sparse": 240}
"""What `python -m benchmarks.ledger` prints for a step of layer 17, conditioning included. Fewer are better."""
MILLISECONDS = {"H100": 7.5, "A100": 15.0, "T4": 140.0}
"""Bounds of a step of layer 17 with nothing dead, on paper."""


def tiny() -> Recipe:
    """Unequal sizes that a CPU takes at once."""
    recipe = RECIPES["layer 17"].at("tiny", group_sizes=(6, 10, 12, 20), d_sae=48, k=5, batch_tokens=32, k_aux=7)
    return replace(recipe, d=12)


@pytest.fixture(scope="module", params=CASES)
def layer17(request: pytest.FixtureRequest) -> Count:
    return count(RECIPES["layer 17"], precision=CASES[request.param], backend=request.param)


@pytest.fixture(scope="module", params=["dense", "sparse"])
def layer17_dead(request: pytest.FixtureRequest) -> Count:
    """A twentieth of the latents is dead."""
    return count(RECIPES["layer 17"], precision=CASES[request.param], backend=request.param, dead_share=0.05)


def seconds(counted: Count) -> dict[str, float]:
    """Of a step, on the machines that take this precision."""
    low = torch.float16 if counted.precision == "fp16" else torch.bfloat16
    return {machine.name: machine.seconds(counted.training) for machine in MACHINES if machine.low == low}


@pytest.mark.parametrize("dead_share", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_fake_step_has_the_operators_of_a_real_one(backend: str, dead_share: float) -> None:
    fake = count(tiny(), precision="fp32", backend=backend, dead_share=dead_share).training
    real = count_for_real(tiny(), precision="fp32", backend=backend, dead_share=dead_share)
    real = [operation for operation in real if operation.phase != "conditioning"]
    assert Tally((o.phase, o.name, o.flops) for o in fake) == Tally((o.phase, o.name, o.flops) for o in real)
    assert len(fake) > 100
    assert any(o.phase == "dead latents" for o in fake) == (dead_share > 0)


def test_no_step_waits_for_the_device_but_to_log(layer17: Count) -> None:
    assert [o for o in layer17.step if o.waits] == []
    assert [o for o in layer17.log_step if o.waits]


def test_no_step_with_dead_latents_waits(layer17_dead: Count) -> None:
    assert [o for o in layer17_dead.step if o.waits] == []


def test_sampled_prefixes_do_not_wait_either() -> None:
    sampled = RECIPES["layer 17"].at("sampled", sampled_prefixes=10)
    for backend in ("dense", "sparse"):
        counted = count(sampled, precision=CASES[backend], backend=backend)
        assert [o for o in counted.step if o.waits] == []
        assert sum(o.name == "fill_" for o in counted.step) == (10 if backend == "sparse" else 0)


def test_kernels_of_a_step(layer17: Count) -> None:
    assert sum(o.n_kernels for o in layer17.step) <= KERNELS[layer17.backend]


def test_memory_is_what_train_says_before_it_starts(layer17: Count, layer17_dead: Count) -> None:
    for counted in (layer17, layer17_dead):
        assert 0.75 <= max(counted.start_peak, counted.step_peak) / counted.estimated <= 1


def test_a_start_takes_no_more_than_a_step(layer17: Count) -> None:
    assert layer17.start_peak < layer17.step_peak


def test_a_step_of_layer_17_is_within_its_bounds(layer17: Count) -> None:
    for name, found in seconds(layer17).items():
        assert found <= 1e-3 * MILLISECONDS.get(name, 30.0), name


def test_dead_latents_cost_less_than_a_third_of_a_step(layer17_dead: Count) -> None:
    alive = count(RECIPES["layer 17"], precision=layer17_dead.precision, backend=layer17_dead.backend)
    for name, found in seconds(layer17_dead).items():
        assert seconds(alive)[name] < found <= 1.3 * seconds(alive)[name], name


@pytest.mark.parametrize(
    ("name", "precision", "machine"),
    [("layer 17", "bf16", "A100"), ("layer 17", "fp16", "T4"), ("131,072 latents", "bf16", "A100")],
)
def test_auto_takes_what_is_faster_on_the_ledger(name: str, precision: str, machine: str) -> None:
    recipe, low = RECIPES[name], torch.float16 if precision == "fp16" else torch.bfloat16
    each = {b: count(recipe, precision=precision, backend=b, dead_share=0.02) for b in ("dense", "sparse")}
    faster = min(each, key=lambda b: seconds(each[b])[machine])
    sizes = {"d_in": recipe.d, "d_out": recipe.d, "d_sae": recipe.d_sae, "k": recipe.config.k, "batch": 4096}
    assert choose_backend(torch.device("cuda"), low=low, **sizes) == faster
    assert all(counted.step_peak <= counted.estimated for counted in each.values())


def test_the_floor_of_layer_17_is_its_gemm_and_adam() -> None:
    h100 = next(machine for machine in MACHINES if machine.name == "H100")
    floor = h100.floor(d_in=2304, d_out=2304, d_sae=18432, batch=4096, low=True)
    assert floor == pytest.approx(2 * 4096 * 2304 * 18432 / 989e12 + 28 * 2 * 2304 * 18432 / 3.35e12)


def test_counts_of_known_operators() -> None:
    with fake_device() as device, Counter(device, numbers={bool: False, int: 3, float: 0.5}) as counter:
        a, b = torch.empty(30, 20, device=device), torch.empty(20, 10, device=device)
        counter.restart()
        product = a @ b
        product[:7].add_(1)
        assert product.t().shape == (10, 30)
        assert int(product.argmax()) == 3
        gathered = a[torch.zeros(5, dtype=torch.int64, device=device)]
    mm, add, argmax, read, zeros, index = counter.operations
    assert (mm.flops, mm.n_bytes, mm.n_kernels) == (2 * 30 * 20 * 10, 4 * (600 + 200 + 300), 1)
    assert (add.name, add.n_bytes) == ("add_", 2 * 4 * 7 * 10)  # the slice is no kernel, nor is the transpose
    assert argmax.n_bytes == 4 * 300 + 8
    assert [o.waits for o in counter.operations] == [False, False, False, True, False, False]
    assert read.name == "_local_scalar_dense"
    assert (zeros.name, zeros.n_bytes) == ("zeros", 40)
    assert (index.name, index.n_bytes) == ("index", 2 * gathered.numel() * 4 + 40)


def test_memory_is_counted_while_it_lives() -> None:
    with fake_device() as device, Counter(device) as counter:
        first = torch.empty(1000, device=device)
        view = first.view(10, 100)[3:]
        assert counter.alive == 4000
        del first
        assert counter.alive == 4000
        second = torch.empty(500, device=device)
        assert (counter.alive, counter.peak) == (6000, 6000)
        del view
        assert (counter.alive, counter.peak) == (2000, 6000)
        del second
    assert counter.alive == 0
