"""Beside Hugging Face's `evaluate`: real pip installs of this project and of a package of that name, in both orders."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def build_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes], extra: Mapping[str, str]) -> Path:
    """A wheel of `files`; `extra` are files of its dist-info."""
    stem = f"{name.replace('-', '_')}-{version}"
    meta = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **extra,
    }
    content = {**files, **{f"{stem}.dist-info/{key}": text.encode() for key, text in meta.items()}}
    record = f"{stem}.dist-info/RECORD"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in content.items():
            archive.writestr(key, data)
        archive.writestr(record, "".join(f"{key},,\n" for key in (*content, record)))
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `pip install .` and `pip install -e .` install, and an `evaluate` with a file that we have too."""
    folder = tmp_path_factory.mktemp("wheels")
    ours = {
        f"{package.replace('.', '/')}/{path.name}": path.read_bytes()
        for package in PROJECT["tool"]["setuptools"]["packages"]
        for path in (ROOT / package.replace(".", "/")).glob("*.py")
    }
    scripts = "".join(f"{name} = {entry}\n" for name, entry in PROJECT["project"]["scripts"].items())
    extra = {"entry_points.txt": f"[console_scripts]\n{scripts}"}
    theirs = {"evaluate/__init__.py": b"from .loading import load\n", "evaluate/loading.py": b"load = print\n"}
    return {
        "ours": build_wheel(folder, PROJECT["project"]["name"], "0.1", ours, extra),
        "editable": build_wheel(
            folder, PROJECT["project"]["name"], "0.2", {"__editable__.pth": str(ROOT).encode()}, extra
        ),
        "theirs": build_wheel(folder, "evaluate", "0.4.6", theirs, {}),
    }


class Environment:
    """A virtual environment that sees the packages of this one, but not this project."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        (self.site,) = folder.glob("lib/python*/site-packages")
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (self.site / "dependencies.pth").write_text("\n".join(ours))

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check"]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-compile", "--quiet", wheel)

    def start(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.bin / command, "--help"], cwd=self.bin, capture_output=True, text=True, check=False)

    def refusal(self, command: str) -> str:
        done = self.start(command)
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        # The safe way is named every time.
        for way in ("python -m venv", "pip install -e .", "pipx install", "uv tool install"):
            assert way in done.stderr
        return done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def test_alone_it_starts(environment: Environment, wheels: dict[str, Path]) -> None:
    environment.install(wheels["ours"])
    for command in PROJECT["project"]["scripts"]:
        done = environment.start(command)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("order", [("theirs", "ours"), ("ours", "theirs")], ids=" then ".join)
def test_mixed_by_pip_nothing_starts(order: tuple[str, str], environment: Environment, wheels: dict[str, Path]) -> None:
    for which in order:
        environment.install(wheels[which])
    for command in PROJECT["project"]["scripts"]:
        said = environment.refusal(command)
        assert f"{environment.site.resolve() / 'evaluate'} is no longer what this project installed" in said
        assert "evaluate 0.4.6 is installed into the same folder" in said
        assert "files that are not ours (evaluate/loading.py)" in said
        assert "pip uninstall evaluate matryoshka-transcoders" in said
    # `pip uninstall evaluate` takes away files of ours that had the same names.
    environment.pip("uninstall", "--yes", "evaluate")
    assert "files of ours are gone (evaluate/__init__.py)" in environment.refusal("evaluate")
    # What the message says helps.
    environment.pip("uninstall", "--yes", "matryoshka-transcoders")
    environment.install(wheels["ours"])
    assert environment.start("evaluate").returncode == 0


@pytest.mark.parametrize("order", [("theirs", "editable"), ("editable", "theirs")], ids=" then ".join)
def test_editable_beside_theirs(order: tuple[str, str], environment: Environment, wheels: dict[str, Path]) -> None:
    """Nothing is overwritten; what does not need `evaluate` runs, and what does is refused and not theirs."""
    for which in order:
        environment.install(wheels[which])
    for command in ("harvest", "train"):
        assert environment.start(command).returncode == 0
    for command in ("evaluate", "pipeline"):
        said = environment.refusal(command)
        assert f"the package 'evaluate' that Python finds is at {environment.site.resolve()}/evaluate/__init__" in said
        assert "Nothing of it was changed" in said
