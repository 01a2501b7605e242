"""What the documents say can be done: commands, flags, files and install lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path for folder in (ROOT, ROOT / "docs", ROOT / "data", ROOT / "examples") for path in folder.glob("*.md")
)
APPS = {"harvest": "harvest.cli", "train": "train.cli", "evaluate": "evaluate.cli", "pipeline": "matryoshka.pipeline"}
TEXT = {".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".ipynb", ".jinja", ".js"}


def commands_of(page: Path) -> Iterator[str]:
    """Lines of code that start a command of ours, also behind torchrun, `!` of a notebook and variables."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    ") or page.suffix == ".sh":
            code = line.strip().lstrip("!").partition("  #")[0].rstrip("\\ ")
            found = re.search(r"(?:^|\s-m |start )((?:harvest|train|evaluate|pipeline) [a-z].*)", code)
            if found and not code.startswith("#"):
                yield found[1]


@pytest.fixture(scope="module")
def apps() -> dict[str, Any]:
    return {name: typer.main.get_command(import_module(module).app) for name, module in APPS.items()}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "slurm.sh"], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_flags_exist(page: Path, apps: dict[str, Any]) -> None:
    for line in commands_of(page):
        name, command, *rest = shlex.split(line, comments=True)
        assert command in apps[name].commands, line
        known = {flag for param in apps[name].commands[command].params for flag in (*param.opts, *param.secondary_opts)}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, line


def test_the_readme_has_every_kind_of_command() -> None:
    """What the test above reads is really there."""
    found = {tuple(shlex.split(line, comments=True)[:2]) for line in commands_of(ROOT / "README.md")}
    assert len(found) >= 12
    assert {name for name, _ in found} >= {"harvest", "train", "evaluate"}
    assert ("evaluate", "report") in found


def test_nobody_is_told_to_install_what_no_index_has() -> None:
    """This project is in no package index: it is installed from the checkout."""
    told = re.compile(r"(?:pip|pipx|uv|uvx)[^\n]*install[^\n`]*matryoshka-transcoders(?!`)")
    found = []
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.suffix in TEXT and inside[0] not in ("data", "tests", "build") and not inside[0].startswith("."):
            for line in path.read_text(encoding="utf-8").splitlines():
                if told.search(line) and "uninstall" not in line:
                    found.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_example_and_document_can_be_found() -> None:
    """Each is named in the README, or in a document that the README names."""
    said = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in (*sorted((ROOT / "examples").iterdir()), *sorted((ROOT / "docs").glob("*.*"))):
        if not path.name.startswith("_"):
            assert path.name in said, path.name


def file_map() -> list[str]:
    """The paths of the README's map: a line holds names in the folder that the lines above it are in."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2]
    found, folder = [], ""
    for line in text.splitlines():
        match = re.fullmatch(r"    (  )?((?:[\w./-]+ )*[\w./-]+)  +\S.*", line)
        if match is not None:
            names = match[2].split()
            found += [f"{folder}{name}" if match[1] else name for name in names]
            folder = folder if match[1] else names[0]
    return found


def test_the_map_of_the_readme() -> None:
    """Every path in it exists, and every folder of code is in it."""
    paths = file_map()
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = {
        f"{file.parent.relative_to(ROOT)}/"
        for top in ("harvest", "train", "evaluate", "matryoshka")
        for file in (ROOT / top).rglob("__init__.py")
    }
    above = {folder for folder in folders if not folder.startswith("evaluate/analyses/") or folder.count("/") == 2}
    assert above - set(paths) == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    tops = ("harvest/", "train/", "evaluate/", "matryoshka/", "tests/", "benchmarks/", "examples/", "docs/")
    named = re.findall(r"`([\w./-]+/[\w.-]*)`", (ROOT / page).read_text(encoding="utf-8"))
    found = [path for path in named if path.startswith(tops)]
    assert len(found) > 5
    assert [path for path in found if not (ROOT / path.replace("NAME/", "")).exists()] == []


def test_memory_of_the_colab_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table is what the command beside it prints."""
    from examples import memory_table

    monkeypatch.setattr("sys.argv", ["memory_table.py", "--gb", "15"])
    memory_table.main()
    assert capsys.readouterr().out in (ROOT / "examples" / "colab-t4.md").read_text(encoding="utf-8")
