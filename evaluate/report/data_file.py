"""A data file of the pages: JSON that a script tag can load from file://."""

from __future__ import annotations

import json
from pathlib import Path


def write_data(folder: Path, name: str, content: object) -> None:
    """A data file: one call of give(), its argument in ASCII JSON, which is JavaScript too."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    (folder / f"{name}.js").write_text(f"give({json.dumps(name)},{text});\n", encoding="ascii")
