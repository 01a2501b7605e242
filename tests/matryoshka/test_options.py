"""Options made from settings: their words, their values, and what every command does with a path."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from typer.testing import CliRunner

import evaluate.cli
import harvest.cli
import matryoshka.pipeline
import train.cli
from evaluate.config import EvaluateConfig
from harvest.config import HarvestConfig
from matryoshka.config import Config, Count, Sizes, choices
from matryoshka.errors import UserError
from matryoshka.options import Given, help_of, with_settings
from train.config import TrainConfig

APPS = {
    "harvest": harvest.cli.app,
    "train": train.cli.app,
    "evaluate": evaluate.cli.app,
    "pipeline": matryoshka.pipeline.app,
}
SETTINGS: dict[str, type[Config]] = {"harvest": HarvestConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
COMMANDS = [(stage, name) for stage, app in APPS.items() for name in typer.main.get_command(app).commands]  # pyright: ignore
NO_PATHS = {
    *("revision", "dataset_config", "dataset_split", "dataset_revision", "text_column", "source", "target", "device"),
    *("input", "wandb_project", "fleet", "grid", "set_", "form", "push", "batch_size", "text", "sets"),
}
"""Text that names no file or folder of this machine. Whoever adds an option says here when it is none."""


class Inner(Config):
    """Settings of a part."""

    top: Count = 7
    """How many."""
    seed: Count = 9
    """Not the seed outside."""


class Sample(Config):
    """Settings of every kind."""

    sizes: Sizes | None = None
    """Sizes; [two] words
    on two lines."""
    weights: tuple[float, ...] = (2.0, 0.5)
    """Weights."""
    grid: dict[str, list[Any]] | None = None
    """Several."""
    kind: Literal["a", "b"] = "b"
    """Which."""
    pack: bool = True
    """End to end."""
    tokens: Count = 15_000_000
    """How many tokens."""
    seed: Count = 1
    """Of the draws."""
    inner: Inner = Inner()
    """A part."""


READ = ("tokens", "sizes", "grid", "weights", "pack", "seed")


def sample_app() -> tuple[typer.Typer, list[Any]]:
    """A command with the settings above, and what it was given."""
    app, seen = typer.Typer(), []

    @app.command()
    @with_settings(
        Sample,
        "train",
        usual=("tokens", "sizes"),
        parts=("inner",),
        shared=("tokens", "sizes", "grid", "weights", "pack", "seed"),
    )
    def run(given: Given[Sample], where: Annotated[Path, typer.Argument()], weights: int = 3) -> None:
        """Do it."""
        seen.append((given, where, weights))

    return app, seen


def given_by(*words: str) -> tuple[Given[Sample], Path, int]:
    app, seen = sample_app()
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_values_are_read_as_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("train: {tokens: 5, kind: a, inner: {top: 1}}")
    grid, file = "{k: [1, 2]}", "~/a.yaml"
    given, where, weights = given_by(
        "~/x", "--sizes", "4, 2k", "--grid", grid, "--no-pack", "--seed", "3", "--config", file
    )
    assert given.settings == Sample(
        sizes=(4, 2000), grid={"k": [1, 2]}, pack=False, tokens=5, kind="a", inner=Inner(top=1, seed=3)
    )
    assert (where, weights) == (tmp_path / "x", 3)  # its own, of that name, wins
    assert given.file == tmp_path / "a.yaml"
    assert dict(given.flags) == {"sizes": "4, 2k", "grid": grid, "pack": False, "seed": "3"}
    again, *_ = given_by("~/x", *given.words(), "--set", "train.kind=b")
    assert again.settings == given.settings.model_copy(update={"kind": "b"})


def test_a_flag_takes_the_place_of_a_whole_value(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {sizes: [3, 4], grid: {k: [1, 2]}, inner: {top: 1}}")
    given, *_ = given_by("x", "--config", str(tmp_path / "a.yaml"), "--grid", "{lr: [3]}", "--sizes", "none")
    assert (given.settings.grid, given.settings.sizes) == ({"lr": [3]}, None)
    # What is a model itself is given part by part.
    assert given_by("x", "--config", str(tmp_path / "a.yaml"), "--top", "7")[0].settings.inner == Inner(top=7)


def test_words_of_the_help() -> None:
    app, _ = sample_app()
    parameters = {p.name: p for p in typer.main.get_command(app).params}
    assert help_of(Sample.model_fields["sizes"]) == "Sizes; [two] words on two lines."
    assert getattr(parameters["sizes"], "help", None) == "Sizes; \\[two] words on two lines."  # no markup
    helps = {name: getattr(parameters[name], "help", None) for name in ("tokens", "pack", "top", "seed")}
    assert helps == {
        "tokens": "How many tokens. (15M)",
        "pack": "End to end. (on)",
        "top": "How many. (7)",
        "seed": "Not the seed outside. (9)",
    }
    assert "kind" not in parameters
    assert [p.name for p in typer.main.get_command(app).params][:5] == ["where", "weights", "tokens", "sizes", "config"]


@pytest.mark.parametrize("stage", SETTINGS)
def test_every_setting_is_a_flag_and_its_docstring_the_help(stage: str) -> None:
    found = {
        (parameter.name, parameter.help)
        for _, name in (command for command in COMMANDS if command[0] == stage)
        for parameter in parameters_of(stage, name)
        if f"--{parameter.name.replace('_', '-')}" in parameter.opts
    }
    for model in models_of(stage):
        for name, field in model.model_fields.items():
            assert field.description, name
            if not isinstance(field.default, Config):
                assert (name, help_of(field).replace("[", "\\[")) in found


def models_of(stage: str) -> list[type[Config]]:
    """The settings of a stage, and those of their parts."""
    outside = SETTINGS[stage]
    return [outside, *(type(f.default) for f in outside.model_fields.values() if isinstance(f.default, Config))]


@pytest.mark.parametrize(("stage", "name"), COMMANDS)
def test_names_are_whole_at_80_columns(stage: str, name: str) -> None:
    shown = CliRunner().invoke(APPS[stage], [name, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    found = set(re.findall(r"--[a-z][a-z0-9-]*(?= )", shown.output))
    wanted = {
        option for parameter in parameters_of(stage, name) for option in parameter.opts if option.startswith("--")
    }
    assert wanted <= found


def test_an_unknown_flag_names_the_nearest_one() -> None:
    result = CliRunner().invoke(APPS["harvest"], ["run", "--val-fracton", "0.1"])
    assert result.exit_code == 2
    assert "No such option: --val-fracton" in result.output
    assert "--val-fraction" in result.output


@pytest.mark.process
@pytest.mark.parametrize("stage", SETTINGS)
def test_help_comes_without_torch(stage: str) -> None:
    start = f"import sys; from {stage}.cli import app"
    code = f"{start}\ntry: app(['run', '--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"


def parameters_of(stage: str, name: str) -> list[Any]:
    return typer.main.get_command(APPS[stage]).commands[name].params  # pyright: ignore


def texts() -> list[Any]:
    """(stage, command, parameter) of everything that takes text, but for what names no path."""
    found = []
    for stage, name in COMMANDS:
        settings = {
            key: field.annotation
            for model in (models_of(stage) if stage in SETTINGS else ())
            for key, field in model.model_fields.items()
        }
        annotations = {**settings, "config": Path, **own_parameters(stage, name)}
        for parameter in parameters_of(stage, name):
            if parameter.name not in NO_PATHS and _holds_text(annotations.get(parameter.name, bool)):
                found.append(pytest.param(stage, name, parameter, id=f"{stage}-{name}-{parameter.name}"))
    return found


def _holds_text(annotation: Any) -> bool:
    """Whether it is text, a path, or a list of one of them."""
    inner = [item for part in (annotation, *get_args(annotation)) for item in get_args(part)]
    return bool(set().union(*(choices(part)[0] for part in (annotation, *inner))) & {str, Path, Any})


def own_parameters(stage: str, name: str) -> dict[str, Any]:
    """What a command declares itself: name -> annotation."""
    (command,) = [c.callback for c in APPS[stage].registered_commands if c.callback and c.callback.__name__ == name]
    return {
        p.name: p.annotation
        for p in inspect.signature(inspect.unwrap(command), eval_str=True).parameters.values()
        if p.name != "given"
    }


@pytest.mark.parametrize(("stage", "name", "parameter"), texts())
@pytest.mark.parametrize(
    ("text", "what"), [("$NOPE/x", r"has the variable \$NOPE"), ("~nobody-here/x", "the home folder of a user")]
)
def test_every_path_is_read_in_one_way(
    stage: str, name: str, parameter: Any, text: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` is the home folder and a variable is refused, before anything is done, by every option of every command."""
    monkeypatch.chdir(tmp_path)
    words = [name]
    for other in parameters_of(stage, name):
        if other.name == parameter.name or other.required:
            value = text if other.name == parameter.name else "0"
            words += [other.opts[0], value] if other.opts[0].startswith("--") else [value] * max(other.nargs, 1)
    result = CliRunner().invoke(APPS[stage], words)
    assert isinstance(result.exception, UserError), result.output
    assert re.search(what, str(result.exception))
    assert list(tmp_path.iterdir()) == []
