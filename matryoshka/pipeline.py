"""The command `pipeline`: the three stages in order, each a no-op when it is already done.

It starts the stage commands as processes, as a person would: the stages' only interface is what lies on disk, and a
stage's memory is gone before the next begins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

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
    file: Annotated[Path, typer.Argument(help="Configuration file with all three sections.")] = Path("pipeline.yaml"),
) -> None:
    """Harvest, train and evaluate what FILE describes. What is done already is not done again."""
    costs = []
    for command in stage_commands(file):
        typer.echo(f"$ {' '.join(command)}", err=True)
        started = time.perf_counter()
        code, peak_bytes = _run([sys.executable, "-m", *command])
        if code != 0:
            raise typer.Exit(code)
        costs.append(f"{command[0]} {time.perf_counter() - started:.0f} s, {peak_bytes / 1e9:.1f} GB")
    typer.echo(f"done: time and peak memory of each stage: {'; '.join(costs)}", err=True)


def stage_commands(file: Path) -> list[list[str]]:
    """The three commands that `pipeline run FILE` starts.

    Raises UserError when the file lacks what says where the shard set and the run lie.
    """
    from matryoshka.config import read_yaml

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


def _run(command: list[str]) -> tuple[int, int]:
    """Exit code and peak resident memory in bytes of one process."""
    process = subprocess.Popen(command)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        # Ctrl-C reaches the stage too; it is left the time to end in order.
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
