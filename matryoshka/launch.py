"""Console-script doors: the commands `harvest`, `train`, `evaluate` and `pipeline` come in here.

Three jobs. Hugging Face ships a package called `evaluate`, so a foreign package under one of our names, or one that pip
has mixed with ours, is refused in one paragraph. Invalid input ends as one paragraph and exit code 2, never as a
traceback. And Ctrl-C and SIGTERM end a command in order, with the command that goes on.
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

DISTRIBUTION = "matryoshka-transcoders"
PACKAGES = ("harvest", "train", "evaluate")
"""The top-level packages whose names others may use too."""
SAFE_INSTALL = (
    "in the checkout: `python -m venv .venv && .venv/bin/pip install -e .`, or `pipx install .`, or `uv tool install .`"
)
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
    _launch("pipeline", "matryoshka.pipeline", PACKAGES)


def check_installation() -> None:
    """Raise UserError where files of another distribution and ours are in one folder, in whichever order they came.

    pip puts two distributions with a package `evaluate` into one folder, file over file, and says nothing. An editable
    install has its files in the checkout, where no other distribution comes.
    """
    here = Path(__file__).resolve().parent.parent
    ours = _installed_modules(here)
    if not ours:
        return
    for package in PACKAGES:
        found = {str(path.relative_to(here)) for path in (here / package).rglob("*.py")}
        strange, missing = sorted(found - ours), sorted(path for path in ours - found if path.startswith(f"{package}/"))
        other = _other_distribution(package, here)
        if other or strange or missing:
            facts = [f"{other} is installed into the same folder"] if other else []
            facts += [f"it holds files that are not ours ({_first(strange)})"] if strange else []
            facts += [f"files of ours are gone ({_first(missing)})"] if missing else []
            raise UserError(
                f"{here / package} is no longer what this project installed: {'; '.join(facts)}. One distribution has "
                f"overwritten the other, and neither works. Run `pip uninstall {package} {DISTRIBUTION}`, then install "
                f"each in a virtual environment of its own; {SAFE_INSTALL}"
            )


def check_package(name: str) -> None:
    """Raise UserError unless the package `name` that Python finds is the one beside this one."""
    here = Path(__file__).resolve().parent.parent
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if origin is None or origin.parent.parent != here:
        raise UserError(
            f"the package {name!r} that Python finds is {f'at {origin}, not' if origin else 'not the one'} in {here}: "
            f"another distribution has a package of that name (Hugging Face's evaluate is one). Nothing of it was "
            f"changed. Use a virtual environment without it; {SAFE_INSTALL}"
        )


def _installed_modules(here: Path) -> set[str]:
    """The Python files in `here` that pip has noted as ours; none for an editable install."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # a checkout that is only on the path
        return set()
    if Path(str(distribution.locate_file(""))).resolve() != here:
        return set()
    if distribution.read_text("RECORD") is None:  # an egg-info in the checkout: the files of an older commit
        return set()
    return {str(path) for path in distribution.files or () if path.suffix == ".py" and path.parts[0] in PACKAGES}


def _other_distribution(name: str, here: Path) -> str | None:
    """Name and version of a distribution called `name` whose files are in `here`."""
    try:
        other = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return f"{name} {other.version}" if Path(str(other.locate_file(""))).resolve() == here else None


def _first(paths: list[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _launch(name: str, module: str, packages: tuple[str, ...] = ()) -> None:
    try:
        with stoppable():
            check_installation()
            for package in packages or (name,):
                check_package(package)
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
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        _fail(f"the memory of the device is not enough: {reason}; use smaller batches or --device cpu, then run again")
    except OSError as error:
        if error.errno not in _USER_OS_ERRORS:
            raise
        _fail(f"{error.strerror}: {error.filename or 'a file'}; free some space or fix the permissions, then run again")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory of a device ended; torch is not imported for it: without it none can."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _fail(message: str) -> None:
    _say(f"error: {' '.join(line.strip() for line in message.splitlines())}")
    sys.exit(2)


def _say_how_to_go_on(name: str, number: signal.Signals) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # the first of several ranks speaks for all
    by = "Ctrl-C" if number == signal.SIGINT else number.name
    _say(f"stopped by {by}; what was finished is kept and nothing is left half-written. The same command continues:")
    # In one line at any width, so that it can be copied.
    print(f"next: {shlex.join([name, *sys.argv[1:]])}", file=sys.stderr)  # noqa: T201


def _say(paragraph: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        paragraph = textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
    print(paragraph, file=sys.stderr)  # noqa: T201 -- the one place that reports failures
