"""`pipeline run`: which commands it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluate.config import EvaluateConfig
from harvest.config import HarvestConfig
from matryoshka.config import load_config, read_yaml
from matryoshka.errors import UserError
from matryoshka.pipeline import stage_commands
from matryoshka.runs import default_run_path
from train.config import TrainConfig, default_group_sizes

ROOT = Path(__file__).parents[2]


def test_folders_follow_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("harvest: {layer: 17}\ntrain: {k: 96}\n")
    harvest, train, evaluate = stage_commands(file)
    assert harvest == ["harvest", "run", "--config", str(file), "--out", "data/l17"]
    assert train[-4:] == ["--shards", "data/l17", "--out", "data/runs/l17-k96"]
    assert evaluate == ["evaluate", "run", "data/runs/l17-k96", "--config", str(file), "--shards", "data/l17"]


def test_named_folders_win(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("harvest: {out: a/b}\ntrain: {out: c}\n")
    assert [command[-1] for command in stage_commands(file)] == ["a/b", "c", "a/b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {k: 4}", "harvest.layer is missing"),
        ("harvest: {layer: 3}", "train.k is missing"),
        ("harvest: {layer: three}\ntrain: {k: 4}", "harvest.layer: expected a number"),
        ("harvst: {}", "unknown section harvst"),
    ],
)
def test_a_file_that_does_not_say_enough_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        stage_commands(file)


@pytest.mark.parametrize("file", sorted([ROOT / "pipeline.yaml", *ROOT.glob("examples/*.yaml")]), ids=lambda f: f.name)
def test_every_shipped_file_is_valid(file: Path) -> None:
    commands = stage_commands(file)
    stages = [words[0] for words in commands if words[0] != "harvest"]
    assert stages == ["train", "evaluate"] * (len(stages) // 2)
    assert len(stages) >= 2
    harvest = load_config(HarvestConfig, "harvest", file=file)
    train = load_config(TrainConfig, "train", file=file)
    assert harvest.tokens >= 200_000
    assert train.group_sizes is not None or harvest.layers is not None


def test_the_shipped_recipes_are_the_owners() -> None:
    wanted = {
        "pipeline.yaml": (17, 15_000_000, (1152, 2304, 4608, 10368), 18432, 96),
        "examples/gemma2-layer12.yaml": (12, 20_000_000, (2304, 4608, 9216, 20736), 36864, 96),
        "examples/gemma2-layer8.yaml": (8, 1_000_000, (2304, 4608, 9216, 2304), 18432, 48),
    }
    for name, recipe in wanted.items():
        harvest = load_config(HarvestConfig, "harvest", file=ROOT / name)
        train = load_config(TrainConfig, "train", file=ROOT / name)
        assert (harvest.layer, harvest.tokens, train.group_sizes, train.d_sae, train.k) == recipe
        assert harvest.model == "google/gemma-2-2b"
        assert (train.lr, train.batch_tokens, train.decay_fraction) == (4e-4, 1024, 0.2)


def test_the_owners_three_commands_are_the_recipe_by_their_defaults() -> None:
    """harvest run --layer 17 --tokens 15M; train run --shards data/l17; evaluate run data/runs/l17-k96"""
    file = ROOT / "pipeline.yaml"
    harvest = load_config(HarvestConfig, "harvest", flags={"layer": 17, "tokens": "15M"})
    assert harvest == load_config(HarvestConfig, "harvest", file=file)
    train = load_config(TrainConfig, "train", flags={"shards": "data/l17"})
    recipe = load_config(TrainConfig, "train", file=file, flags={"shards": "data/l17"})
    assert default_group_sizes(2304) == recipe.group_sizes  # Gemma-2-2b is 2304 wide
    own = {"group_sizes": recipe.group_sizes, "d_sae": recipe.d_sae}
    assert train.model_copy(update=own) == recipe
    assert str(default_run_path("data/l17", train.k)) == "data/runs/l17-k96"
    assert load_config(EvaluateConfig, "evaluate") == load_config(EvaluateConfig, "evaluate", file=file)


def test_pipeline_yaml_lists_every_key_with_its_default() -> None:
    """The recipe is also the reference of the settings: what it does not choose stands there with its default."""
    sections = read_yaml(ROOT / "pipeline.yaml")
    models = {"harvest": HarvestConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
    for name, model in models.items():
        assert set(sections[name]) == set(model.model_fields), name
        chosen = model.model_validate(sections[name])
        for key, field in model.model_fields.items():
            if key not in ("layer", "group_sizes", "d_sae"):
                assert getattr(chosen, key) == field.get_default(call_default_factory=True), f"{name}.{key}"


def test_several_layers_have_recipes_of_their_own() -> None:
    """Each token count is reached by one pass for all layers that want as many: no context runs twice."""
    commands = stage_commands(ROOT / "examples" / "gemma2-layers.yaml")
    harvests = [words[4:] for words in commands if words[0] == "harvest"]
    assert harvests == [
        ["--layers", "8,12,17", "--out", "data", "--tokens", "1000000"],
        ["--layers", "12,17", "--out", "data", "--tokens", "15000000"],
        ["--layer", "12", "--out", "data/l12", "--tokens", "20000000"],
    ]
    wanted = {
        8: ((2304, 4608, 9216, 2304), 18432, 48),
        12: ((2304, 4608, 9216, 20736), 36864, 96),
        17: ((1152, 2304, 4608, 10368), 18432, 96),
    }
    for layer, train_words, evaluate_words in zip(wanted, commands[3::2], commands[4::2], strict=True):
        given = [word for flag, word in zip(train_words, train_words[1:], strict=False) if flag == "--set"]
        train = load_config(TrainConfig, "train", file=Path(train_words[3]), overrides=given)
        run = f"data/runs/l{layer}-k{train.k}"
        assert (train.group_sizes, train.d_sae, train.k) == wanted[layer]
        assert train.lr == 4e-4
        assert train_words[-2:] == ["--out", run]
        assert train_words[4:6] == evaluate_words[-2:] == ["--shards", f"data/l{layer}"]
        assert evaluate_words[2] == run


def test_a_set_that_has_grown_is_not_asked_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matryoshka.pipeline._tokens_of", lambda place: {"l12": 15_000_000}.get(Path(place).name, 0))
    commands = stage_commands(ROOT / "examples" / "gemma2-layers.yaml")
    assert [words[5] for words in commands if words[0] == "harvest"] == ["8,17", "12,17", "12"]
    monkeypatch.setattr("matryoshka.pipeline._tokens_of", lambda _: 20_000_000)
    commands = stage_commands(ROOT / "examples" / "gemma2-layers.yaml")
    assert [words[4:6] for words in commands if words[0] == "harvest"] == [["--layer", "12"]]


def test_a_range_of_layers(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("harvest: {layers: 3-5}\ntrain: {k: 4}\nlayers: {4: {train: {k: 2}}}\n")
    harvest, *rest = stage_commands(file)
    assert harvest[4:6] == ["--layers", "3,4,5"]
    assert [words[-1] for words in rest[::2]] == ["data/runs/l3-k4", "data/runs/l4-k2", "data/runs/l5-k4"]


def test_layers_with_one_recipe(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text('harvest: {layers: [3, 5], out: "s3://b/l{layer}"}\ntrain: {k: 4, out: "runs/{layer}"}\n')
    harvest, *rest = stage_commands(file)
    assert harvest[4:] == ["--layers", "3,5", "--out", "s3://b/l{layer}"]
    assert [words[-1] for words in rest] == ["runs/3", "s3://b/l3", "runs/5", "s3://b/l5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("harvest: {layer: 3}\nlayers: {3: {tokens: 1M}}", "needs harvest.layers"),
        ("harvest: {layers: [3]}\nlayers: {4: {tokens: 1M}}", r"4 is none of harvest.layers = \[3\]"),
        ("harvest: {layers: [3]}\nlayers: {3: {k: 4}}", "3 can have tokens and train"),
        ("harvest: {layers: [3, 4]}\nlayers: {3: {tokens: 1M}}\ntrain: {k: 4}", "give harvest.tokens"),
        ("harvest: {layers: [3, 4]}\ntrain: {k: 4, out: here}", r"train.out has to hold \{layer\}"),
        ("harvest: {layers: [3, 4]}", "train.k is missing"),
        ("harvest: {layers: all}", "expected numbers of blocks and ranges of them, .* found 'all'"),
    ],
)
def test_layers_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        stage_commands(file)
