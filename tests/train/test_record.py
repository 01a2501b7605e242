"""What is refused before a run writes anything, and what the refusal says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.run_facts import read_run_facts
from matryoshka.shards import ShardSet
from train.config import TrainConfig
from train.record import diverged_reason, publish_diverged, publish_session
from train.run import train
from train.step.backend import has_fast_bf16


def config_of(settings: dict[str, Any], out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**settings, "out": out, **changes})


def test_a_run_of_another_set_is_refused_by_names(
    random_shards: ShardSet, run_settings: dict[str, Any], make_shards: Any, tmp_path: Path
) -> None:
    train(config_of(run_settings, tmp_path / "run", steps=2))
    before = (tmp_path / "run" / "run.json").read_bytes()
    other = make_shards(torch.randn(15 * 230, 12), torch.randn(15 * 230, 10))
    with pytest.raises(UserError) as error:
        train(config_of(run_settings, tmp_path / "run", steps=2, shards=str(other.path)))
    message = str(error.value)
    assert f"({random_shards.path})" in message
    assert f"({other.path})" in message
    assert "their activations are not" in message  # made with equal settings
    assert random_shards.digest not in message
    gone = Path(shutil.copytree(str(random_shards.path), tmp_path / "copy"))
    train(config_of(run_settings, tmp_path / "run2", steps=2, shards=str(gone)))
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=r"cannot be compared any more \(.*copy is not a shard set"):
        train(config_of(run_settings, tmp_path / "run2", steps=2, shards=str(other.path)))
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_fleet_of_another_set_is_refused_by_names(
    random_shards: ShardSet, run_settings: dict[str, Any], make_shards: Any, tmp_path: Path
) -> None:
    fleet = ({"name": "a"},)
    train_any(config_of(run_settings, tmp_path / "fleet", steps=2, fleet=fleet))
    other = make_shards(torch.randn(15 * 230, 12), torch.randn(15 * 230, 10))
    again = config_of(run_settings, tmp_path / "fleet", steps=2, fleet=fleet, shards=str(other.path))
    with pytest.raises(UserError) as error:
        train_any(again)
    assert f"({random_shards.path})" in str(error.value)
    assert f"({other.path})" in str(error.value)
    assert random_shards.digest not in str(error.value)
    (tmp_path / "fleet" / "a" / "run.json").unlink()  # as a kill right after fleet.json leaves it
    with pytest.raises(UserError, match=r"\(unknown\), .* no run of it says where that set is"):
        train_any(again)


def test_a_default_written_out_is_the_same_run(run_settings: dict[str, Any], tmp_path: Path) -> None:
    """The recipe of a file, in which everything is written out, goes on with `train run --shards` alone."""
    first = config_of(run_settings, tmp_path / "run", steps=4, group_sizes=(6, 12, 24, 54), d_sae=96)
    assert train(first).n_steps_taken == 4
    same = {"group_sizes": None, "d_sae": None, "steps": None, "tokens": 4 * first.batch_tokens}
    written_out = {"warmup_steps": 0, "k_aux": 2 * first.k, "input": "normalized"}
    for changes in (same, same | written_out):
        assert train(config_of(run_settings, tmp_path / "run", **changes)).n_steps_taken == 0
    for other in ({"group_sizes": (12, 6, 24, 54)}, {"warmup_steps": 1}, {"k_aux": 9}, {"input": "resid_mid"}):
        with pytest.raises(UserError, match=r"with other settings \(plan\."):
            train(config_of(run_settings, tmp_path / "run", **(same | other)))


def test_a_run_of_before_a_setting_is_held_against_what_it_did(run_settings: dict[str, Any], tmp_path: Path) -> None:
    first = config_of(run_settings, tmp_path / "run", steps=4)
    train(first)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    for name in ("k_start", "k_steps", "lr"):
        del record["identity"]["plan"][name]
    record["identity"]["config"]["lr"] = first.lr  # where runs of that time have it
    path.write_text(json.dumps(record))
    assert train(config_of(run_settings, tmp_path / "run", steps=4)).n_steps_taken == 0
    assert train(config_of(run_settings, tmp_path / "run", steps=4, k_start=first.k, k_steps=0)).n_steps_taken == 0
    for other, what in (
        ({"k_start": 6, "k_steps": 0}, r"plan\.k_start: 4 -> 6"),
        ({"lr": 0.1}, r"plan\.lr: 0\.003 -> 0"),
    ):
        with pytest.raises(UserError, match=what):
            train(config_of(run_settings, tmp_path / "run", steps=4, **other))


def test_a_run_with_a_setting_that_is_gone_goes_on_where_it_decided_nothing(
    run_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = config_of(run_settings, tmp_path / "run", steps=4)
    train(settings)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    for part in (record["config"], record["identity"]["config"]):
        part |= {"init_scale": 1.0, "lr_d_sae": None}
    path.write_text(json.dumps(record))
    assert train(settings).n_steps_taken == 0
    record["identity"]["config"]["init_scale"] = 2.0
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"config\.init_scale: 2\.0 -> null"):
        train(settings)


def test_run_json_says_what_was_used(random_shards: ShardSet, run_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(run_settings, tmp_path / "run", steps=4)
    train(config)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    ids = {split: set(random_shards.split(split).doc_ids(0).flatten().tolist()) for split in ("train", "val")}
    for shard in range(1, random_shards.train.n_shards):
        ids["train"] |= set(random_shards.train.doc_ids(shard).flatten().tolist())
    assert record["data"]["documents"] == {split: len(found) for split, found in ids.items()}
    assert record["data"]["val_unit"] == random_shards.val_unit
    (session,) = record["sessions"]
    assert session == {
        "first_step": 0,
        "device": "cpu",
        "precision": "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32",
        "backend": "sparse",
        "n_ranks": 1,
    }
    facts = read_run_facts(path.parent, 4)
    assert (facts.input, facts.k_aux, facts.tokens) == ("normalized", 2 * config.k, 4 * config.batch_tokens)
    assert facts.seconds is not None
    before = path.read_bytes()
    publish_session(path.parent, 4, {name: session[name] for name in session if name != "first_step"})
    assert path.read_bytes() == before  # as it was: said once
    publish_session(path.parent, 4, {**session, "first_step": 4, "device": "cuda:0"})
    facts = read_run_facts(path.parent, 4)
    assert (facts.device, facts.backend) == ("cpu, then cuda:0", "sparse")


def test_the_backend_of_the_first_steps_is_written_down(run_settings: dict[str, Any], tmp_path: Path) -> None:
    """`auto` is dense while k is large, here at its start, and k of the settings would be sparse."""
    for k_start, backend in ((4, "sparse"), (12, "dense")):
        train(config_of(run_settings, tmp_path / f"from-{k_start}", steps=10, k_start=k_start))
        (session,) = json.loads((tmp_path / f"from-{k_start}" / "run.json").read_text())["sessions"]
        assert session["backend"] == backend


def test_a_folder_of_sets_names_them(random_shards: ShardSet, run_settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("l3", "l7"):
        shutil.copytree(str(random_shards.path), tmp_path / "sets" / name)
    with pytest.raises(UserError) as error:
        train(config_of(run_settings, tmp_path / "run", shards=str(tmp_path / "sets")))
    for name in ("l3", "l7"):
        assert str(tmp_path / "sets" / name) in str(error.value)
    assert "harvest run" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "changes",
    [{"device": "cuda"}, {"k": 4000}, {"input": "mlp_out"}, {"batch_tokens": 10**6}, {"group_weights": (1.0,)}],
    ids=str,
)
def test_what_is_refused_leaves_nothing_behind(
    changes: dict[str, Any], run_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**run_settings, **changes}
    for more in ({}, {"fleet": ({"name": "a"}, {"name": "b", "lr": 1e-3})}):
        with pytest.raises(ValueError, match="."):
            train_any(config_of({**settings, **more}, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def train_any(config: TrainConfig) -> None:
    from train.run import train_fleet

    train_fleet(config)


@pytest.mark.parametrize("name", ["diverged.json", "parked.json"])
def test_a_run_that_diverged_is_known_by_its_record_new_or_old(
    run_settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """Older runs have the same content in parked.json."""
    folder = tmp_path / "run"
    train(config_of(run_settings, folder, steps=2))
    assert diverged_reason(folder) is None
    publish_diverged(folder, step=3, loss=float("nan"), checkpoint=folder / "checkpoints" / "step-000002")
    (folder / "diverged.json").rename(folder / name)
    reason = diverged_reason(folder)
    assert reason is not None
    assert "before step 3: the loss (nan)" in reason
    assert f"delete {folder / name}" in reason
