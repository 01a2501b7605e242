"""Settings that cannot work are refused with the likely cause, and defaults are what the recipes say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from matryoshka.config import load_config
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from train.config import TrainConfig, default_group_sizes
from train.fleet import members
from train.plan import make_plan


def test_a_cumulative_list_is_named_as_the_likely_cause() -> None:
    with pytest.raises(ValidationError, match=r"cumulative list of prefix ends; the sizes would be 16,32,48"):
        TrainConfig(group_sizes=(16, 48, 96), d_sae=96, k=4)
    with pytest.raises(ValidationError, match=r"sum to 60, not to d_sae = 61.*cumulative"):
        TrainConfig(group_sizes=(10, 20, 30), d_sae=61, k=4)


def test_k_larger_than_the_first_prefix_is_refused() -> None:
    with pytest.raises(ValidationError, match="k = 17 is larger than the first prefix of 16 latents"):
        TrainConfig(group_sizes=(16, 32), k=17)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 10, "tokens": 1000}, "not both"),
        ({"d_sae": 100}, "give group_sizes too"),
        ({"lr": 0}, "greater than 0"),
        ({"group_sizes": []}, "at least 1 item"),
        ({"group_sizes": [4, 0], "k": 1}, "greater than or equal to 1"),
        ({"learning_rate": 1}, "Extra inputs"),
        ({"k_steps": 5}, "give k_start too"),
        ({"group_sizes": [8, 8], "k": 1, "group_weights": [1, 2], "sampled_prefixes": 2}, "not both"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(values)


def test_group_sizes_from_the_command_line() -> None:
    config = load_config(TrainConfig, "train", flags={"group_sizes": "1152,2304,4608,10368", "d_sae": "18432"})
    assert config.group_sizes == (1152, 2304, 4608, 10368)
    assert config.k == 96


def test_the_default_groups_are_the_layer_17_recipe() -> None:
    assert default_group_sizes(2304) == (1152, 2304, 4608, 10368)
    assert sum(default_group_sizes(577)) == 8 * 577


def test_an_unquoted_off_in_yaml_is_off() -> None:
    assert TrainConfig.model_validate({"wandb": False}).wandb == "off"


def test_the_plan_resolves_every_default(random_shards: ShardSet) -> None:
    plan = make_plan(TrainConfig(k=4, batch_tokens=100), random_shards, n_rows=2750)
    assert plan.group_sizes == (6, 12, 24, 54)
    assert plan.n_steps == 27
    assert plan.input == "normalized"
    assert plan.k_aux == 8  # 2 k
    assert plan.dead_after_tokens == 135
    assert (plan.warmup_steps, plan.decay_steps) == (1, 5)


def test_weights_must_fit_the_groups(random_shards: ShardSet) -> None:
    config = TrainConfig(group_sizes=(8, 16), group_weights=(1.0,), k=2, batch_tokens=100)
    with pytest.raises(UserError, match="1 values for 2 groups"):
        make_plan(config, random_shards, n_rows=2000)


@pytest.mark.parametrize(
    ("key", "value", "what"), [("lr_d_sae", 16, "give the lr of this"), ("init_scale", 1.0, "leave it out")]
)
def test_a_setting_that_is_gone_says_what_to_do(tmp_path: Path, key: str, value: float, what: str) -> None:
    (tmp_path / "old.yaml").write_text(f"train: {{{key}: {value}}}")
    with pytest.raises(UserError, match=f"{key}: unknown key, this setting is gone: .*{what}"):
        load_config(TrainConfig, "train", file=tmp_path / "old.yaml")
    fleet = TrainConfig(shards="data/l1", fleet=({"name": "a", key: value},))
    with pytest.raises(UserError, match=f"member a: {key}: unknown key, this setting is gone: .*{what}"):
        members(fleet)


def test_k_over_the_run(random_shards: ShardSet) -> None:
    config = TrainConfig(group_sizes=(16, 48), k=2, k_start=12, batch_tokens=100)
    schedule = make_plan(config, random_shards, n_rows=2000).k_schedule(config)
    assert [schedule.at(step) for step in (0, 1, 2, 3, 4, 19)] == [12, 10, 7, 4, 2, 2]
    with pytest.raises(UserError, match="k_start = 65 is more than the 64"):
        make_plan(config.model_copy(update={"k_start": 65}), random_shards, n_rows=2000)
    with pytest.raises(UserError, match="k_steps = 20 leaves no step at k = 2"):
        make_plan(config.model_copy(update={"k_steps": 20}), random_shards, n_rows=2000)
