"""The estimate of memory, by hand for a small run, and the refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.runs import read_json
from matryoshka.shards import ShardSet
from train import member
from train import memory as module
from train.config import TrainConfig
from train.memory import MemoryEstimate, check_memory, estimated_bytes, free_memory, member_estimate, release_memory
from train.plan import make_plan
from train.run import train_fleet
from train.step.step import StepReport

CPU = torch.device("cpu")


def test_what_is_held_is_what_the_state_has(random_shards: ShardSet, run_settings: dict[str, Any]) -> None:
    from train.step.step import StepState

    config = TrainConfig.model_validate(run_settings | {"skip": True, "calibration_tokens": 1})
    plan = make_plan(config, random_shards, 2000)
    state = StepState.create(
        W_enc=torch.zeros(48, 12),
        b_enc=torch.zeros(48),
        W_dec=torch.nn.functional.one_hot(torch.arange(48) % 10, 10).float(),
        b_dec=torch.zeros(10),
        W_skip=torch.zeros(12, 10),
    )
    n_bytes = sum(tensor.nbytes for name, tensor in state.tensors().items() if tensor.ndim)
    estimate = member_estimate(config, plan, d_in=12, d_out=10, device=CPU)
    scratch = 8 << 20
    assert estimate.held == n_bytes + scratch
    assert estimate.snapshot >= n_bytes
    dense = member_estimate(config.model_copy(update={"backend": "dense"}), plan, d_in=12, d_out=10, device=CPU)
    assert dense.step - estimate.step == 12 * 128 * 48
    # A GPU holds a matrix of dead latents' activations, here of all.
    fp16 = config.model_copy(update={"precision": "fp16", "backend": "sparse"})
    on_gpu = member_estimate(fp16, plan, d_in=12, d_out=10, device=torch.device("cuda"))
    assert on_gpu.step - estimate.step == 8 * 128 * 48
    # Over five ranks the largest part has ten latents; what is not a latent's every rank has.
    part = member_estimate(config, plan, d_in=12, d_out=10, device=CPU, n_parts=5)
    assert part.held - scratch == 12 * (10 * 23 + 10 + 120) + 8 * 10
    assert estimate.held - scratch == 12 * (48 * 23 + 10 + 120) + 8 * 48
    assert part.snapshot >= estimate.snapshot > 4 * (part.held - scratch)
    assert part.step < estimate.step
    calibrated = member_estimate(
        config.model_copy(update={"calibration_tokens": 10_000_000}), plan, d_in=12, d_out=10, device=CPU
    )
    assert calibrated.step > 4 * config.k * 10_000_000


def test_a_larger_k_at_the_start_counts(random_shards: ShardSet, run_settings: dict[str, Any]) -> None:
    """`auto` is dense on a GPU while k is large, and needs the matrices of the dense backend then."""
    wide = run_settings | {"group_sizes": (131_072,), "k": 96, "batch_tokens": 4096, "precision": "bf16"}

    def step(**changes: Any) -> int:
        config = TrainConfig.model_validate(wide | changes)
        plan = make_plan(config, random_shards, 2000)
        return member_estimate(config, plan, d_in=2304, d_out=2304, device=torch.device("cuda")).step

    dense = step(k_start=384, backend="dense")
    assert step(k_start=384) == dense > step(k_start=384, backend="sparse")
    assert step(k_start=96) == step(k_start=96, backend="sparse")


def test_what_does_not_fit_is_refused_before_anything_is_written(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = [{"name": "small"}, {"name": "large", "group_sizes": [8, 8000]}]
    config = TrainConfig.model_validate(run_settings | {"out": tmp_path / "fleet", "fleet": fleet})
    monkeypatch.setattr(module, "free_memory", lambda: 2_000_000)
    with pytest.raises(UserError, match=r"needs about 0\.\d\d GB on the CPU, and 0\.00 GB are free \(largest: large"):
        train_fleet(config)
    assert not (tmp_path / "fleet").exists()
    monkeypatch.setattr(module, "free_memory", lambda: None)
    check_memory({"a": MemoryEstimate(held=10**18, step=0, snapshot=0)}, 0, CPU)


def test_the_steps_of_members_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = {name: MemoryEstimate(held=10, step=100, snapshot=30) for name in "abc"}
    monkeypatch.setattr(module, "free_memory", lambda: int(1.2 * (7 + 3 * 10 + 100 + 30)))
    check_memory(estimates, 7, CPU)
    assert estimated_bytes(list(estimates.values()), 7) == 200
    with pytest.raises(UserError, match="fewer runs at once"):
        check_memory(estimates, 8, CPU)


def test_giving_back_keeps_what_is_in_use() -> None:
    before = torch.arange(1_000_000)
    release_memory()
    assert torch.equal(before, torch.arange(1_000_000))


def test_free_memory_is_less_than_all() -> None:
    free = free_memory()
    if free is not None:
        assert 0 < free < 2**50


@pytest.mark.parametrize("where", ["start", "step"])
def test_memory_that_ends_is_told_with_the_run_and_what_helps(
    where: str, run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the sparse backend the same run goes on."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")

    class Full(member.TrainStep):
        def __call__(self, x: Tensor, y: Tensor, *, lr: float, log: bool = False) -> StepReport | None:
            return super().__call__(x, y, lr=lr, log=log) if int(self.state.step) < 9 else full()

    monkeypatch.setattr(member, *(("initial_state", full) if where == "start" else ("TrainStep", Full)))
    settings = run_settings | {"out": tmp_path / "fleet", "fleet": [{"name": "first"}], "backend": "dense"}
    with pytest.raises(UserError) as error:
        train_fleet(TrainConfig.model_validate(settings))
    said = str(error.value)
    assert said.startswith(
        "the memory of cpu is not enough for the run first (CUDA out of memory. Tried to allocate 2 GiB.). The largest "
        "part of a step is the activations of 128 rows x 48 latents, of the dense backend: 0.00 GB, several times."
    )
    assert "--set train.backend=sparse, with which the run continues; or fewer runs at once" in said
    monkeypatch.undo()
    (run,) = train_fleet(TrainConfig.model_validate(settings | {"backend": "sparse", "precision": "fp32"})).runs
    assert run.outcome == "finished"
    assert run.n_steps_taken == (24 if where == "start" else 17)
    used = [session["backend"] for session in read_json(run.path / "run.json", what="run")["sessions"]]
    assert used == (["sparse"] if where == "start" else ["dense", "sparse"])
