"""Who may import whom, and what may happen at import. Read from the source, so that no run has to reach a line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("harvest", "train", "evaluate")
PACKAGES = ("matryoshka", *STAGES)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

OWNERS = {
    "zarr": ("matryoshka/shards/",),
    "numcodecs": ("matryoshka/shards/",),
    "google_crc32c": ("matryoshka/shards/",),
    "transformer_lens": ("matryoshka/lm/",),
    "transformers": ("matryoshka/lm/", "matryoshka/tokens.py"),
    "datasets": ("harvest/text.py",),
    "pyarrow": ("harvest/text.py", "evaluate/", "matryoshka/interop/"),
    "safetensors": ("matryoshka/transcoder.py", "matryoshka/interop/weight_files.py", "train/checkpoint.py"),
    "huggingface_hub": ("matryoshka/interop/hub.py", "matryoshka/lm/", "harvest/text.py", "matryoshka/tokens.py"),
    "wandb": ("matryoshka/wandb_runs.py",),
    "yaml": ("matryoshka/config.py", "matryoshka/pipeline.py", "matryoshka/interop/circuit_tracer.py"),
    "obstore": ("matryoshka/shards/",),
    "umap": ("evaluate/analyses/hierarchy/clusters.py",),
    "sklearn": ("evaluate/analyses/hierarchy/clusters.py", "evaluate/measures/probe.py"),
    "scipy": ("evaluate/measures/row_acts.py",),
    "sae_lens": (),
    "pickle": (),
}
"""Third-party package -> the only files (or folders) that may import it."""

names = [path.relative_to(ROOT).as_posix() for path in SOURCES]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of all modules a file imports, wherever in it the import stands; relative ones made absolute."""
    return tuple(_imports(tree(path), path.relative_to(ROOT).with_suffix("").parts[:-1]))


def _imports(source: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*start, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 30
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    # the reader of imports sees those inside functions and relative ones
    assert "torch" in tops(ROOT / "harvest" / "capture.py")
    assert "zarr" in tops(ROOT / "matryoshka" / "shards" / "layout.py")
    assert "harvest.config" in set(imports(ROOT / "harvest" / "cli.py"))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_only_themselves_and_matryoshka(stage: str) -> None:
    for path in (ROOT / stage).rglob("*.py"):
        assert tops(path) & set(PACKAGES) <= {stage, "matryoshka"}, path


def test_matryoshka_imports_no_stage() -> None:
    for path in (ROOT / "matryoshka").rglob("*.py"):
        assert not tops(path) & set(STAGES), path


@pytest.mark.parametrize("stage", STAGES)
def test_inside_a_stage_imports_are_relative(stage: str) -> None:
    """Hugging Face has a package `evaluate`: only matryoshka/launch.py says the bare name of a stage."""
    for path in (ROOT / stage).rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] != stage, path
            if isinstance(node, ast.Import):
                assert stage not in {alias.name.partition(".")[0] for alias in node.names}, path


@pytest.mark.parametrize("package", OWNERS)
def test_each_format_has_one_owner(package: str) -> None:
    users = [name for path, name in zip(SOURCES, names, strict=True) if package in tops(path)]
    assert [name for name in users if not name.startswith(OWNERS[package])] == []


def test_only_the_shards_package_is_behind_its_door() -> None:
    """Outside matryoshka/shards nobody needs its layout (chunks, codecs), which may change with the format."""
    allowed = {"harvest/estimate.py", "harvest/info.py"}
    users = {
        name for path, name in zip(SOURCES, names, strict=True) if "matryoshka.shards.layout" in set(imports(path))
    }
    assert {name for name in users if not name.startswith("matryoshka/shards/")} <= allowed


def test_training_and_its_tests_never_need_the_language_model() -> None:
    paths = [*(ROOT / "train").rglob("*.py"), *(ROOT / "tests" / "train").rglob("*.py")]
    assert len(paths) > 10
    for path in paths:
        assert not tops(path) & {"transformer_lens", "datasets", "transformers"}, path
        assert not [name for name in imports(path) if name.startswith("matryoshka.lm")], path


def test_only_the_commands_import_the_pages() -> None:
    """The pages read results of every analysis; what another file needs of a result is read by the result's owner."""
    users = [
        path
        for path in (ROOT / "evaluate").rglob("*.py")
        if "report" not in path.relative_to(ROOT).parts[:-1]
        and any(name.startswith("evaluate.report.") for name in imports(path))
    ]
    assert {path.name for path in users} <= {"cli.py", "terminal.py"}


def test_a_table_of_results_is_named_in_one_file() -> None:
    named: dict[str, set[str]] = {}
    for path in (ROOT / "evaluate").rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".parquet"):
                named.setdefault(node.value, set()).add(path.name)
    assert len(named) > 6
    assert {name: files for name, files in named.items() if len(files) > 1} == {}


LEVELS = {
    "cli": 8,
    "__main__": 8,
    "commands": 7,
    "report": 6,
    "analyses": 5,
    "measures": 4,
    "language_model": 4,
    "rows": 3,
    "tables": 3,
    "analysis": 3,
    "resume": 2,
    "result": 2,
    "subject": 1,
    "config": 0,
    "__init__": 0,
}
"""What is at the root of evaluate/, and how high: a file imports nothing that is higher than itself."""


def own_imports(path: Path) -> set[str]:
    """Full names of our own modules that a file imports, wherever in it; a package where no module of it is named."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found & set(MODULES) - {module_of(path)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def test_evaluate_has_few_files_at_its_root_and_each_has_a_level() -> None:
    root = ROOT / "evaluate"
    assert {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/__init__.py")} == set(
        LEVELS
    )
    assert len(list(root.glob("*.py"))) <= 8


def test_nothing_in_evaluate_imports_upwards() -> None:
    for path in (ROOT / "evaluate").rglob("*.py"):
        own = LEVELS[path.relative_to(ROOT).with_suffix("").parts[1]]
        for name in own_imports(path):
            if name.startswith("evaluate."):
                assert LEVELS[name.split(".")[1]] <= own, (path, name)


def test_no_analysis_imports_another_one() -> None:
    folder = ROOT / "evaluate" / "analyses"
    for path in folder.glob("*/*.py"):
        for name in own_imports(path):
            if name.startswith("evaluate.analyses."):
                assert name.split(".")[2] == path.parent.name, (path, name)


def test_the_pages_measure_nothing() -> None:
    """Only `serve` runs the language model, on texts that are typed into a page."""
    live = {"live_text.py", "live_change.py"}
    for path in (ROOT / "evaluate" / "report").rglob("*.py"):
        names = own_imports(path)
        assert not [name for name in names if name.startswith("evaluate.measures")], path
        assert path.name in live or not [name for name in names if name.startswith("evaluate.language_model")], path


def test_no_import_circles() -> None:
    """Imports inside functions and under TYPE_CHECKING counted, but for two: a Transcoder opens foreign formats, and
    is put into a language model, by code that is built on it."""
    edges = {module: own_imports(path) for module, path in MODULES.items()}
    shims = {"matryoshka.interop.pretrained", "matryoshka.lm.splice"}
    assert shims <= edges["matryoshka.transcoder"]
    edges["matryoshka.transcoder"] -= shims
    order: dict[str, None] = {}

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in order:
            for name in sorted(edges[module]):
                visit(name, (*above, module))
            order[module] = None

    for module in edges:
        visit(module, ())


def test_files_are_named_by_what_they_are_about() -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler", "base"}
    for path in SOURCES:
        assert not banned & set(path.stem.split("_")), path
        assert not banned & set(path.relative_to(ROOT).parts), path


def test_files_are_one_idea_long() -> None:
    assert {
        path.relative_to(ROOT).as_posix(): n
        for path in (*SOURCES, *TESTS)
        if (n := len(path.read_text().splitlines())) > 400
    } == {}


def test_source_is_ascii() -> None:
    for path in [*SOURCES, *TESTS]:
        assert path.read_bytes().isascii(), path


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_unsafe_or_global_is_called() -> None:
    banned = {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads", "yaml.unsafe_load"}
    banned |= {"torch.manual_seed", "torch.seed", "np.random.seed", "random.seed", "torch.set_default_dtype"}
    for path in SOURCES:
        for name, call in calls(path):
            assert name not in banned, (path, name)
            if name == "np.load":  # its default is safe, but must not depend on the version
                assert "allow_pickle=False" in ast.unparse(call), path
            for keyword in call.keywords:
                trusted = keyword.arg == "trust_remote_code" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                )
                assert not trusted, path


def test_modules_do_no_work_at_import() -> None:
    """At the top level: imports, definitions, constants, and the two guards."""
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.If):
                assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), (path, node.lineno)
            elif isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), (path, node.lineno)
            else:
                allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
                allowed += (ast.Assign, ast.AnnAssign)
                assert isinstance(node, allowed), (path, node.lineno)


@pytest.mark.process
def test_the_doors_import_nothing_heavy() -> None:
    """`--help` has to answer in under a second, and importing torch alone takes longer."""
    doors = ["matryoshka", "matryoshka.launch", "matryoshka.pipeline", *(f"{stage}.cli" for stage in STAGES)]
    code = (
        f"import sys, {', '.join(doors)}\n"
        "heavy = {'torch', 'zarr', 'numpy', 'transformers', 'transformer_lens', 'datasets', 'wandb', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_public_names_come_from_the_top() -> None:
    import matryoshka

    for name in matryoshka.__all__:
        assert getattr(matryoshka, name).__name__ == name
    assert {"ShardSet", "Transcoder"} <= set(matryoshka.__all__)
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = matryoshka.NoSuchThing
