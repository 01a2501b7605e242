"""Many runs from one stream: what a fleet's settings mean, and that no member feels the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import train.member as module
from matryoshka.errors import UserError
from matryoshka.ranks import Rank
from matryoshka.shards import ShardSet
from train.batches.stream import Batch, Stream
from train.config import TrainConfig
from train.fleet import members
from train.progress import NoProgress
from train.result import FleetResult, TrainResult
from train.run import train, train_fleet
from train.step.step import StepReport

ROOT = Path(__file__).resolve().parents[2]
FILES = ("transcoder.safetensors", "optimizer.safetensors", "config.json", "state.json")
LIST = (
    {"name": "plain"},
    {"name": "wide", "group_sizes": [8, 88], "lr": 1e-3, "steps": 30, "init": "tied"},
    {"name": "other", "k": 2, "seed": 3, "input": "resid_mid", "condition": "standardise", "skip": True, "steps": 17},
)


def config_of(settings: dict[str, Any], out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings | {"out": out} | changes)


def trained(result: TrainResult) -> dict[str, bytes]:
    """Every byte that a run has learned and measured."""
    assert result.checkpoint is not None
    files = [result.checkpoint / name for name in FILES] + [result.path / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files}


def by_name(result: FleetResult) -> dict[str, TrainResult]:
    return {run.path.name: run for run in result.runs}


class StopAt(NoProgress):
    """A kill when one run has finished a given step, as far as the files can tell."""

    def __init__(self, name: str, step: int) -> None:
        self.at = (name, step)

    def advanced(self, name: str, step: int, report: StepReport | None) -> None:  # noqa: ARG002
        if (name, step) == self.at:
            raise KeyboardInterrupt


def test_a_list_and_a_grid_multiply(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(
        run_settings,
        tmp_path,
        fleet=[{"name": "a"}, {"k": 2, "tokens": "1k"}],
        grid={"lr": [1e-3, 2e-3], "group_sizes": ["8,16", [24]]},
    )
    found = {member.name: member.config for member in members(config)}
    assert len(found) == 8
    assert found["a-lr=0.001-group_sizes=8+16"].group_sizes == (8, 16)
    one = found["k=2-tokens=1k-lr=0.002-group_sizes=24"]
    assert (one.k, one.lr, one.group_sizes, one.tokens, one.steps) == (2, 2e-3, (24,), 1000, None)
    assert one.out == tmp_path / "k=2-tokens=1k-lr=0.002-group_sizes=24"
    assert one.fleet is None
    assert one.grid is None


def test_a_member_takes_along_what_was_derived_from_what_it_replaces(
    run_settings: dict[str, Any], tmp_path: Path
) -> None:
    shared = {"group_sizes": [8, 16], "d_sae": 24, "group_weights": [1, 2], "steps": 9}
    fleet = [{"name": "a", "group_sizes": [8, 8, 8]}, {"name": "b", "sampled_prefixes": 3}, {"name": "c", "k": 2}]
    a, b, c = (member.config for member in members(config_of(run_settings, tmp_path, **shared, fleet=fleet)))
    assert (a.group_sizes, a.d_sae, a.group_weights, a.steps) == ((8, 8, 8), None, None, 9)
    assert (b.sampled_prefixes, b.group_weights, b.d_sae) == (3, None, 24)
    assert (c.group_sizes, c.d_sae, c.group_weights) == ((8, 16), 24, (1, 2))


def test_a_run_alone_is_a_fleet_of_one(run_settings: dict[str, Any], tmp_path: Path) -> None:
    (member,) = members(config_of(run_settings, tmp_path / "mine"))
    assert (member.name, member.folder) == ("mine", tmp_path / "mine")
    (member,) = members(TrainConfig.model_validate(run_settings))
    assert member.folder == Path(run_settings["shards"]).parent / "runs" / "l3-k4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fleet": [{"name": "a", "batch_tokens": 64}]}, "sets batch_tokens, but all members are trained on the same"),
        ({"grid": {"max_norm": [5, 10]}}, "max_norm=5 sets max_norm, but all members"),
        ({"fleet": [{"name": "a", "device": "cpu"}]}, "belongs to the whole command"),
        ({"fleet": [{"name": "a", "learning_rate": 1}]}, "unknown key learning_rate; known keys: name, group_sizes"),
        ({"fleet": [{"name": "a", "lr": -1}]}, "member a: lr: should be greater than 0"),
        ({"fleet": [{"name": "a"}, {"name": "a", "k": 2}]}, "two members of the fleet are called a"),
        ({"fleet": [{"name": "../a"}]}, "cannot name a folder"),
        ({"fleet": [{"lr": 1e-3}], "grid": {"lr": [1e-3]}}, "both set lr"),
        ({"fleet": []}, "describe no run"),
        ({"grid": {"k": []}}, "describe no run"),
    ],
)
def test_what_cannot_be_a_fleet_is_refused(
    run_settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_fleet(config_of(run_settings, tmp_path / "fleet", **changes))
    assert not (tmp_path / "fleet").exists()


def test_alone_equals_in_a_fleet_bit_for_bit(run_settings: dict[str, Any], tmp_path: Path) -> None:
    fleet = by_name(train_fleet(config_of(run_settings, tmp_path / "fleet", fleet=LIST)))
    for entry in LIST:
        changes = {key: value for key, value in entry.items() if key != "name"}
        alone = train(config_of(run_settings, tmp_path / "alone" / str(entry["name"]), **changes))
        assert trained(alone) == trained(fleet[str(entry["name"])]), entry["name"]


def test_a_killed_fleet_goes_on_bit_for_bit(run_settings: dict[str, Any], tmp_path: Path) -> None:
    whole = by_name(train_fleet(config_of(run_settings, tmp_path / "whole", fleet=LIST)))
    # Their own checkpoint steps, so that the kill leaves them at different places.
    entries = [entry | {"checkpoint_every": every} for entry, every in zip(LIST, (5, 7, 3), strict=True)]
    config = config_of(run_settings, tmp_path / "killed", fleet=entries)
    for name, step in (("wide", 4), ("plain", 11), ("wide", 20), ("wide", 29)):
        with pytest.raises(KeyboardInterrupt):
            train_fleet(config, StopAt(name, step))
    killed = by_name(train_fleet(config))
    assert killed["other"].n_steps_taken == 0
    for name, run in whole.items():
        assert trained(run) == trained(killed[name]), name


def test_adding_a_config_trains_just_that_one(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_fleet(config_of(run_settings, tmp_path, fleet=LIST[:2]))
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in (".lock", "fleet.json")]
    before = {path: path.read_bytes() for path in kept}
    read: list[int] = []

    def counted(self: Stream, start: int, stop: int) -> Iterator[Batch]:
        read.append(stop - start)
        return batches(self, start, stop)

    batches = Stream.batches
    monkeypatch.setattr(Stream, "batches", counted)
    result = by_name(train_fleet(config_of(run_settings, tmp_path, fleet=LIST)))
    assert {name: run.n_steps_taken for name, run in result.items()} == {"plain": 0, "wide": 0, "other": 17}
    assert read[-1] == 17
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((tmp_path / "fleet.json").read_text())["members"] == ["plain", "wide", "other"]


def test_one_stream_feeds_all(run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = {"n": 0}
    load = Stream.load

    def counted(self: Stream, *args: Any) -> Any:
        loads["n"] += 1
        return load(self, *args)

    monkeypatch.setattr(Stream, "load", counted)
    train_fleet(config_of(run_settings, tmp_path / "one", fleet=LIST[:1]))
    alone = loads["n"]
    loads["n"] = 0
    same = [LIST[0] | {"name": name, "lr": lr} for name, lr in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3))]
    train_fleet(config_of(run_settings, tmp_path / "three", fleet=same))
    assert loads["n"] == alone


class Poisoned(module.TrainStep):
    """The run with k = 2 sees a NaN in its eleventh batch."""

    def __call__(self, x: Tensor, y: Tensor, *, lr: float, log: bool = False) -> StepReport | None:
        if self.settings.k == 2 and int(self.state.step) == 10:
            x = x.clone()
            x[3, 2] = float("nan")
        return super().__call__(x, y, lr=lr, log=log)


def test_a_run_that_goes_non_finite_is_diverged_and_the_others_go_on(
    run_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = by_name(train_fleet(config_of(run_settings, tmp_path / "healthy", fleet=LIST)))
    monkeypatch.setattr(module, "TrainStep", Poisoned)
    config = config_of(run_settings, tmp_path / "fleet", fleet=LIST)
    result = by_name(train_fleet(config))
    assert {name: run.outcome for name, run in result.items()} == {
        "plain": "finished",
        "wide": "finished",
        "other": "diverged",
    }
    assert "before step 11" in result["other"].reason
    assert result["other"].checkpoint == tmp_path / "fleet/other/checkpoints/step-000007"
    assert json.loads((tmp_path / "fleet/other/diverged.json").read_text())["checkpoint"] == "step-000007"
    for name in ("plain", "wide"):
        assert trained(result[name]) == trained(healthy[name])
    # It stays diverged until its record is deleted, and then goes on as if nothing had been.
    monkeypatch.undo()
    assert by_name(train_fleet(config))["other"].outcome == "diverged"
    (tmp_path / "fleet/other/diverged.json").unlink()
    assert trained(by_name(train_fleet(config))["other"]) == trained(healthy["other"])


def test_a_folder_of_another_kind_or_stream_is_refused(run_settings: dict[str, Any], tmp_path: Path) -> None:
    train(config_of(run_settings, tmp_path / "run", steps=2))
    with pytest.raises(UserError, match="is a single run, not a fleet"):
        train_fleet(config_of(run_settings, tmp_path / "run", fleet=LIST))
    train_fleet(config_of(run_settings, tmp_path / "fleet", steps=2, fleet=[{"name": "a"}]))
    with pytest.raises(UserError, match="not empty and not a run"):
        train(config_of(run_settings, tmp_path / "fleet"))
    with pytest.raises(UserError, match=r"stream\.batch_tokens: 128 -> 64"):
        train_fleet(config_of(run_settings, tmp_path / "fleet", steps=2, batch_tokens=64, fleet=[{"name": "b"}]))


def test_ranks_share_the_fleet(run_settings: dict[str, Any], tmp_path: Path) -> None:
    whole = by_name(train_fleet(config_of(run_settings, tmp_path / "whole", fleet=LIST)))
    config = config_of(run_settings, tmp_path / "shared", fleet=LIST)
    ranks = [by_name(train_fleet(config, rank=Rank(index, 2))) for index in (0, 1)]
    assert [list(runs) for runs in ranks] == [["plain", "other"], ["wide"]]
    for name, run in (ranks[0] | ranks[1]).items():
        assert trained(run) == trained(whole[name])


@pytest.mark.torchrun
def test_torchrun_spreads_the_runs_over_its_ranks(run_settings: dict[str, Any], tmp_path: Path) -> None:
    whole = by_name(train_fleet(config_of(run_settings, tmp_path / "whole", fleet=LIST)))
    config = tmp_path / "sweep.yaml"
    config.write_text(json.dumps({"train": run_settings | {"fleet": LIST, "out": str(tmp_path / "shared")}}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "train", "run", "--config", str(config), "--parallel", "configs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name, run in whole.items():
        assert run.checkpoint is not None
        shared = TrainResult(
            tmp_path / "shared" / name, tmp_path / "shared" / run.checkpoint.relative_to(tmp_path / "whole"), 0, 0
        )
        assert trained(shared) == trained(run)


def test_more_ranks_than_runs(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(run_settings, tmp_path, steps=2, fleet=LIST[:1])
    assert train_fleet(config, rank=Rank(1, 2)).runs == ()
    assert not any(tmp_path.iterdir())


def test_what_a_member_learns_does_not_depend_on_reader_threads(run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(run_settings, tmp_path / "moved")
    with pytest.raises(KeyboardInterrupt):
        train(config, StopAt("moved", 11))
    moved = train(config.model_copy(update={"readers": 4}))
    assert trained(moved) == trained(train(config_of(run_settings, tmp_path / "whole")))


def test_initial_rows_are_shared_by_members_of_one_seed(random_shards: ShardSet, tmp_path: Path) -> None:
    settings = {"shards": random_shards.path, "k": 2, "steps": 1, "batch_tokens": 32, "buffer_tokens": 256}
    wide = train_fleet(
        config_of(
            settings, tmp_path / "ab", fleet=[{"name": "a", "group_sizes": [80]}, {"name": "b", "group_sizes": [40]}]
        )
    )
    alone = train(config_of(settings, tmp_path / "b", group_sizes=[40]))
    assert trained(by_name(wide)["b"]) == trained(alone)
