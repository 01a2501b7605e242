"""The command `pipeline`: the three stages in order, each a no-op when it is already done.

It starts the stage commands as processes, as a person would: the stages' only interface is what lies on disk, and a
stage's memory is gone before the next begins.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from matryoshka.config import DEFAULT_FILE, parse_count, read_yaml
from matryoshka.errors import UserError
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
def run(
    file: Annotated[Path, typer.Argument(help="Configuration file with all three sections.")] = DEFAULT_FILE,
) -> None:
    """Harvest, train and evaluate what FILE describes. What is done already is not done again."""
    for command in stage_commands(file):
        typer.echo(f"$ {' '.join(command)}", err=True)
        finished = subprocess.run([sys.executable, "-m", *command], check=False)
        if finished.returncode != 0:
            raise typer.Exit(finished.returncode)


def stage_commands(file: Path) -> list[list[str]]:
    """The three commands that `pipeline run FILE` starts.

    Raises UserError when the file lacks what says where the shard set and the run lie.
    """
    sections = read_yaml(file)
    harvest, train = sections.get("harvest", {}), sections.get("train", {})
    shards = (
        Path(harvest["out"]) if harvest.get("out") else default_shards_path(_number(file, harvest, "harvest", "layer"))
    )
    run = Path(train["out"]) if train.get("out") else default_run_path(shards, _number(file, train, "train", "k"))
    configuration = ["--config", str(file)]
    return [
        ["harvest", "run", *configuration, "--out", str(shards)],
        ["train", "run", *configuration, "--shards", str(shards), "--out", str(run)],
        ["evaluate", "run", str(run), *configuration, "--shards", str(shards)],
    ]


def _number(file: Path, section: dict[str, Any], name: str, key: str) -> int:
    value = section.get(key)
    if value is None:
        raise UserError(f"{file}: {name}.{key} is missing; the pipeline needs it, or {name}.out, to know its folders")
    try:
        return parse_count(value)
    except ValueError as error:
        raise UserError(f"{file}: {name}.{key}: {error}") from error
