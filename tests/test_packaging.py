"""What is installed is what is in the checkout, and the commands are there."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = ("harvest", "train", "evaluate", "pipeline")
FEATURES = ("cloud", "probing", "structure")
"""Extras that users choose."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_package_list_is_what_is_on_the_disk() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ROOT.iterdir()
        if top.is_dir()
        and not top.name.startswith(".")
        and top.name not in ("tests", "benchmarks", "data", "build", "dist")
        for path in top.rglob("__init__.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)
    assert (ROOT / "matryoshka" / "py.typed").is_file()


def test_commands_exist_and_are_callable() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert sorted(scripts) == sorted(COMMANDS)
    distribution = metadata.distribution(PROJECT["project"]["name"])
    installed = {entry.name: entry for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert {name: entry.value for name, entry in installed.items()} == scripts
    for entry in installed.values():
        assert callable(entry.load())


def answer(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return ANSI.sub("", done.stdout)


@pytest.mark.process
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_answer_help(name: str, tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name(name))
    text = answer([script, "--help"], tmp_path)
    assert "Usage" in text
    assert "run" in text
    assert "--help" in answer([script, "run", "--help"], tmp_path)


@pytest.mark.process
@pytest.mark.parametrize("name", ["harvest", "train", "evaluate"])
def test_stages_start_as_modules_too(name: str, tmp_path: Path) -> None:
    assert "Usage" in answer([sys.executable, "-m", name, "--help"], tmp_path)


FLAGS = {
    "harvest": "model dataset layer tokens ctx-len batch-size dtype codec seed out config set",
    "train": "shards out group-sizes d-sae k steps tokens batch-tokens lr input condition precision checkpoint-every "
    "seed wandb device config set",
    "evaluate": "shards tokens device config set",
}


@pytest.mark.process
@pytest.mark.parametrize("name", FLAGS)
def test_promised_flags(name: str, tmp_path: Path) -> None:
    text = answer([str(Path(sys.executable).with_name(name)), "run", "--help"], tmp_path)
    found = set(re.findall(r"--([a-z-]+)", text))
    assert set(FLAGS[name].split()) <= found


def test_help_shows_defaults_in_full(tmp_path: Path) -> None:
    """Rich takes square brackets for markup and swallows them."""
    text = " ".join(answer([str(Path(sys.executable).with_name("harvest")), "run", "--help"], tmp_path).split())
    for part in ("google/gemma-2-2b", "data/l<layer>"):
        assert part in text


def test_unknown_flags_are_errors(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("harvest"))
    done = subprocess.run([script, "run", "--leyers", "3"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--leyers" in ANSI.sub("", done.stderr)


def test_data_is_never_committed(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)

    def is_ignored(path: str) -> bool:
        command = ["git", "-C", str(tmp_path), "check-ignore", "--quiet", "--no-index", path]
        return subprocess.run(command, check=False).returncode == 0

    for path in (
        "data/l17/zarr.json",
        "data/runs/a/run.json",
        "data/x",
        "matryoshka/__pycache__/a.pyc",
        ".venv/bin/python",
    ):
        assert is_ignored(path), path
    for path in ("data/README.md", "harvest/run.py", "tests/conftest.py", "examples/demo.yaml"):
        assert not is_ignored(path), path
    assert (ROOT / "data" / "README.md").is_file()


HOSTS = {"IPython"}
"""What runs us: imported only where it is running already."""


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", item, maxsplit=1)[0].lower() for item in requirements}


def _imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """The distributions' modules that `nodes` import, without our own and Python's."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.partition(".")[0])
    return modules - set(sys.stdlib_module_names) - {"matryoshka", "harvest", "train", "evaluate"}


def test_what_is_imported_is_declared() -> None:
    """Not left to come along with something else; what an extra brings is imported only inside of functions."""
    homes = metadata.packages_distributions()
    always = _names(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = _names([item for name in FEATURES for item in extras[name]])
    missing: dict[str, str] = {}
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        for path in (ROOT / package.replace(".", "/")).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inside = _imported(ast.walk(tree)) - HOSTS
            for modules, declared in ((_imported(tree.body), always), (inside, always | optional)):
                for top in modules:
                    if not declared & {home.lower() for home in homes.get(top, [])}:
                        missing[top] = str(path.relative_to(ROOT))
    assert missing == {}


def test_the_tests_and_the_demo_have_the_features_they_need() -> None:
    """The README's commands work in the environment that `make demo` makes; only object stores are left out there."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {*FEATURES, "demo", "dev"}
    for name in FEATURES:
        assert f"matryoshka-transcoders[{name}]" in extras["dev"]
        assert (f"matryoshka-transcoders[{name}]" in extras["demo"]) == (name != "cloud")
