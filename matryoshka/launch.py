"""Console-script doors: the commands `harvest`, `train`, `evaluate` and `pipeline` come in here.

Three jobs. Hugging Face ships a package called `evaluate`, so a foreign package under one of our names is refused in
one sentence. What is invalid input ends as one paragraph and exit code 2, never as a traceback. And Ctrl-C and SIGTERM
end a command in order, with the command that goes on.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import shlex
import shutil
import signal
import sys
import textwrap
from importlib import metadata
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.interrupt import SIGNALS, Stopped, stoppable

_USER_OS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def harvest() -> None:
    """The command `harvest`."""
    _launch("harvest", "harvest.cli")


def train() -> None:
    """The command `train`."""
    _launch("train", "train.cli")


def evaluate() -> None:
    """The command `evaluate`."""
    _launch("evaluate", "evaluate.cli")


def pipeline() -> None:
    """The command `pipeline`."""
    _launch("pipeline", "matryoshka.pipeline")


def check_package(name: str) -> None:
    """Raise UserError unless the package `name` is the one that was installed with this one."""
    here = Path(__file__).resolve().parent.parent
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if origin is None or origin.parent.parent != here or _is_merged(name, here):
        raise UserError(
            f"the package {name!r} that Python finds at {origin} is not ours alone: another distribution of that name "
            f"is installed. Run `pip uninstall {name}` (for Hugging Face's evaluate) and install this project again, "
            "or use a virtual environment of its own"
        )


def _is_merged(name: str, here: Path) -> bool:
    """Whether pip has put a distribution called `name` into our very folder, its files over ours or under them."""
    try:
        return Path(str(metadata.distribution(name).locate_file(""))).resolve() == here
    except metadata.PackageNotFoundError:
        return False


def _launch(name: str, module: str) -> None:
    try:
        with stoppable():
            check_package(module.partition(".")[0])
            importlib.import_module(module).app(prog_name=name)
    except Stopped as stopped:
        _say_how_to_go_on(name, stopped.signal)
        sys.exit(stopped.exit_code)
    except SystemExit as ended:
        # What ends after the step in hand has taken the signal itself.
        if ended.code in {128 + number for number in SIGNALS}:
            _say_how_to_go_on(name, signal.Signals(int(ended.code) - 128))
        raise
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _USER_OS_ERRORS:
            raise
        _fail(
            f"{error.strerror}: {error.filename or 'a file'}; free some space or mend the permissions, then run again"
        )


def _fail(message: str) -> None:
    _say(f"error: {' '.join(line.strip() for line in message.splitlines())}")
    sys.exit(2)


def _say_how_to_go_on(name: str, number: signal.Signals) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # the first of several ranks speaks for all
    by = "Ctrl-C" if number == signal.SIGINT else number.name
    _say(f"stopped by {by}; what was finished is kept and nothing is left half-written. The same command goes on:")
    # In one line at any width, so that it can be copied.
    print(f"next: {shlex.join([name, *sys.argv[1:]])}", file=sys.stderr)  # noqa: T201


def _say(paragraph: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        paragraph = textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
    print(paragraph, file=sys.stderr)  # noqa: T201 -- the one place that reports failures
