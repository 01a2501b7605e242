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

RECIPES = {recipe.name: recipe for recipe in recipes()}
CASES = {"dense": "bf16", "sparse": "fp32"}
KERNELS = {"dense": 667, "sparse": 590}
"""What `python -m benchmarks.ledger` prints for a step of layer 17, conditioning included. Fewer are better."""


def tiny() -> Recipe:
    """Unequal sizes that a CPU takes at once."""
    recipe = RECIPES["layer 17"].at("tiny", group_sizes=(6, 10, 12, 20), d_sae=48, k=5, batch_tokens=32, k_aux=7)
    return replace(recipe, d=12)


@pytest.fixture(scope="module", params=CASES)
def layer17(request: pytest.FixtureRequest) -> Count:
    return count(RECIPES["layer 17"], precision=CASES[request.param], backend=request.param)


@pytest.mark.parametrize("backend", CASES)
def test_a_fake_step_has_the_operators_of_a_real_one(backend: str) -> None:
    fake = count(tiny(), precision="fp32", backend=backend).training
    real = [o for o in count_for_real(tiny(), precision="fp32", backend=backend) if o.phase != "conditioning"]
    assert Tally((o.phase, o.name, o.flops) for o in fake) == Tally((o.phase, o.name, o.flops) for o in real)
    assert len(fake) > 100


def test_no_step_waits_for_the_device_but_to_log(layer17: Count) -> None:
    assert [o for o in layer17.step if o.waits] == []
    assert [o for o in layer17.log_step if o.waits]


def test_kernels_of_a_step(layer17: Count) -> None:
    assert sum(o.n_kernels for o in layer17.step) <= KERNELS[layer17.backend]


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
