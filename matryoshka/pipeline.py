"""The command `pipeline`: the three stages in order, for one layer or several, each a no-op when it is already done.

It starts the stage commands as processes, as a person would: the stages' only interface is what is on disk, and a
stage's memory is gone before the next begins.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshka.errors import UserError
from matryoshka.interrupt import Stopped
from matryoshka.locations import inside, location
from matryoshka.options import with_paths
from matryoshka.runs import default_run_path, default_shards_path

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Run harvest, train and evaluate in order, from one configuration file.",
)


@app.callback()
def _pipeline() -> None:
    # With a callback, typer keeps the name of a single command: `pipeline run`.
    pass


@app.command()
@with_paths
def run(
    file: Annotated[Path, typer.Argument(help="Configuration file with all three sections.")] = Path("pipeline.yaml"),
) -> None:
    """Harvest, train and evaluate what FILE describes. What is done already is not done again."""
    costs = []
    for command in stage_commands(file):
        typer.echo(f"$ {shlex.join(command)}", err=True)
        started = time.perf_counter()
        code, peak_bytes = _run([sys.executable, "-m", *command])
        if code != 0:
            raise typer.Exit(code)
        costs.append(f"{command[0]} {time.perf_counter() - started:.0f} s, {peak_bytes / 1e9:.1f} GB")
    typer.echo(f"done: time and peak memory of each stage: {'; '.join(costs)}", err=True)


def stage_commands(file: Path) -> list[list[str]]:
    """The commands that `pipeline run FILE` starts: harvest, and train and evaluate for each layer.

    Of several layers (`harvest.layers`) the section `layers` says what one has of its own: `tokens`, and settings of
    `train`. Layers that want fewer tokens are harvested that far together with the others, which then grow: text comes
    in one order, so no context goes through the model twice.

    Raises UserError when the file lacks what says where the shard sets and the runs are.
    """
    from matryoshka.config import read_yaml

    sections = read_yaml(file)
    harvest, train = sections.get("harvest", {}), sections.get("train", {})
    own = _own(file, sections)
    if not own:
        place = harvest.get("out")
        shards = location(str(place)) if place else default_shards_path(_number(file, harvest, "harvest", "layer"))
        run = Path(train["out"]) if train.get("out") else default_run_path(shards, _number(file, train, "train", "k"))
        return [
            ["harvest", "run", "--config", str(file), "--out", str(shards)],
            *_of_one_set(file, shards, run, {}),
        ]
    form = str(harvest.get("out") or Path("data"))
    places = {layer: location(form.replace("{layer}", str(layer))) for layer in own}
    if "{layer}" not in form:
        places = {layer: inside(form, f"l{layer}") for layer in own}
    commands = [
        ["harvest", "run", "--config", str(file), *words] for words in _passes(file, own, places, form, harvest)
    ]
    for layer, settings in own.items():
        changes = settings.get("train") or {}
        recipe = {**train, **changes}
        run = default_run_path(places[layer], _number(file, recipe, "train", "k"))
        if recipe.get("out"):
            if "{layer}" not in str(recipe["out"]):
                raise UserError(f"{file}: train.out has to hold {{layer}}, since every layer has a run of its own")
            run = Path(str(recipe["out"]).replace("{layer}", str(layer)))
        commands += _of_one_set(file, places[layer], run, changes)
    return commands


def _of_one_set(file: Path, shards: Path | str, run: Path, changes: dict[str, Any]) -> list[list[str]]:
    where = ["--config", str(file), "--shards", str(shards)]
    own = [word for key, value in changes.items() for word in ("--set", f"train.{key}={json.dumps(value)}")]
    return [
        ["train", "run", *where, *own, "--out", str(run)],
        ["evaluate", "run", str(run), *where],
    ]


def _passes(
    file: Path, own: dict[int, dict[str, Any]], places: dict[int, Path | str], form: str, harvest: dict[str, Any]
) -> list[list[str]]:
    """Options of the harvests after which every layer has its tokens, the fewest first."""
    from matryoshka.config import parse_count

    usual = parse_count(harvest["tokens"]) if harvest.get("tokens") is not None else None
    wanted = {layer: settings.get("tokens", usual) for layer, settings in own.items()}
    if set(wanted.values()) == {None}:
        return [_pass(list(own), places, form)]
    if None in wanted.values():
        raise UserError(f"{file}: some layers have tokens of their own and some do not; give harvest.tokens for those")
    found = []
    had = {layer: _tokens_of(place) for layer, place in places.items()}
    for goal in sorted({n for n in wanted.values() if n is not None}):
        # A set that has grown beyond this goal is not to be asked for fewer tokens than it has.
        layers = [layer for layer, n in wanted.items() if n is not None and had[layer] <= goal <= n]
        if layers:
            found.append([*_pass(layers, places, form), "--tokens", str(goal)])
    return found


def _pass(layers: list[int], places: dict[int, Path | str], form: str) -> list[str]:
    if len(layers) == 1:
        return ["--layer", str(layers[0]), "--out", str(places[layers[0]])]
    return ["--layers", ",".join(map(str, layers)), "--out", form]


def _tokens_of(place: Path | str) -> int:
    """The tokens that a set which was begun is to have; 0 where there is none that could be read."""
    from matryoshka.shards.records import read_manifest

    try:
        tokens = read_manifest(place).settings.get("tokens")
    except UserError:
        return 0  # if something is wrong there, the harvest says it better
    return tokens if isinstance(tokens, int) else 0


def _own(file: Path, sections: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Layer -> what it has of its own; empty where the file describes one shard set."""
    from matryoshka.config import parse_count, parse_layers

    layers, own = sections.get("harvest", {}).get("layers"), sections.get("layers", {})
    if layers is None:
        if own:
            raise UserError(f"{file}: the section layers needs harvest.layers, such as [8, 12, 17]")
        return {}
    try:
        names = list(parse_layers(layers))
        given = {parse_count(layer): settings or {} for layer, settings in own.items()}
        for layer, settings in given.items():
            if layer not in names:
                raise ValueError(f"{layer} is none of harvest.layers = {names}")
            if not isinstance(settings, dict) or set(settings) - {"tokens", "train"}:
                raise ValueError(f"{layer} can have tokens and train, found {settings}")
            if "tokens" in settings:
                settings["tokens"] = parse_count(settings["tokens"])
    except ValueError as error:
        raise UserError(f"{file}: harvest.layers, or the section layers: {error}") from error
    return {layer: given.get(layer, {}) for layer in names}


def _run(command: list[str]) -> tuple[int, int]:
    """Exit code and peak resident memory in bytes of one process."""
    process = subprocess.Popen(command)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except Stopped as stopped:
        # Ctrl-C reaches the stage too, SIGTERM does not. It is left the time to end in order.
        if stopped.signal == signal.SIGTERM:
            process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    kilo = 1 if sys.platform == "darwin" else 1024
    return process.returncode, usage.ru_maxrss * kilo


def _number(file: Path, section: dict[str, Any], name: str, key: str) -> int:
    from matryoshka.config import parse_count

    value = section.get(key)
    if value is None:
        raise UserError(f"{file}: {name}.{key} is missing; the pipeline needs it, or {name}.out, to know its folders")
    try:
        return parse_count(value)
    except ValueError as error:
        raise UserError(f"{file}: {name}.{key}: {error}") from error
