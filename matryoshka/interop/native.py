"""Our own format: transcoder.safetensors + config.json, as in a checkpoint."""

from __future__ import annotations

from pathlib import Path

from matryoshka.interop.inputs import ExportInputs
from matryoshka.transcoder import TranscoderConfig


def place(inputs: ExportInputs) -> str:  # noqa: ARG001 -- as every format's
    """At the top."""
    return "."


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write the two files."""
    inputs.transcoder.save(folder)


def dropped(config: TranscoderConfig) -> list[str]:  # noqa: ARG001 -- as every format's
    """Nothing."""
    return []
