"""Run docs/tutorial.ipynb from top to bottom with the demo's model, and store what it shows: `make tutorial`."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def sources_digest(notebook: Any) -> str:
    """sha256 over the source of every cell; the stored outputs are those of the cells with this digest."""
    return hashlib.sha256("\0".join(cell.source for cell in notebook.cells).encode()).hexdigest()


def main() -> None:
    """Execute the notebook in place; its data/tutorial is made anew."""
    if not (ROOT / "data" / "demo" / "inputs" / "model").is_dir():
        sys.exit("data/demo/inputs holds no model: run `make demo` first")
    shutil.rmtree(ROOT / "data" / "tutorial", ignore_errors=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    notebook.metadata["sources_sha256"] = sources_digest(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
