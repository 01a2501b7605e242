"""docs/tutorial.ipynb runs from top to bottom. On a tiny random model, since CI has no demo data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from examples.run_tutorial import sources_digest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"

# jupyter_client and ipykernel warn of their own affairs (platform folders, unclosed sockets of the kernel).
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::ResourceWarning"),
    pytest.mark.process,
]


@pytest.fixture(scope="module")
def notebook() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def shown(notebook: Any) -> list[str]:
    """What each cell of code shows, as text and as HTML."""
    return [
        "".join(
            output.get("text", "") + "".join(str(value) for value in output.get("data", {}).values())
            for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_is_stored_with_what_it_shows(notebook: Any) -> None:
    """Of the demo's model, of the very cells that are there, and of no machine in particular."""
    import nbformat

    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert notebook.metadata["sources_sha256"] == sources_digest(notebook), "run `make tutorial`"
    text = "".join(shown(notebook))
    assert "tiny random" not in text
    assert str(ROOT) not in text
    assert not any(start in text for start in ("/home/", "/root/", "/work/", "/tmp/"))
    assert NOTEBOOK.stat().st_size < 200_000


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
    cells = shown(notebook)
    assert sum("<progress" in cell for cell in cells) >= 2  # harvest and train draw a bar
    printed = "".join(cells)
    assert "a tiny random one is used" in printed
    for end in (16, 48, 128):
        assert printed.count(f"first {end:5} latents") == 2
    assert printed.count("x its largest activation: p(promoted)") == 3
    assert "(16, 48) normalized" in printed
    assert (tmp_path / "exports" / "saelens" / "sae_weights.safetensors").is_file()
