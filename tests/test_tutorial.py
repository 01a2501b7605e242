"""docs/tutorial.ipynb runs from top to bottom. On a tiny random model, since CI has no demo data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"

# jupyter_client and ipykernel warn of their own affairs (platform folders, unclosed sockets of the kernel).
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def notebook() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs(notebook: Any) -> None:
    import nbformat

    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name, value in {
        "TUTORIAL_ROOT": ROOT,
        "TUTORIAL_OUT": tmp_path,
        "TUTORIAL_TINY": 1,
        "PYTHONPATH": ROOT,
        "JUPYTER_PLATFORM_DIRS": 1,
        "IPYTHONDIR": tmp_path / "ipython",
        "JUPYTER_RUNTIME_DIR": tmp_path / "jupyter",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        monkeypatch.setenv(name, str(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        done.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code"
    )
    assert "a tiny random one stands in" in printed
    for end in (16, 48, 128):
        assert printed.count(f"first {end:5} latents") == 2
    assert "more likely" in printed
    assert "(16, 48) normalized" in printed
    assert (tmp_path / "exports" / "saelens" / "sae_weights.safetensors").is_file()
