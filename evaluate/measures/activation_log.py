"""Which latents fire on which rows, kept on the disk: what fires together can be counted for a few latents at a time.

A part is one batch of rows, an npz file without objects: latent int32 [n_active] ordered by row, per_row int32 [rows],
and value float32 [n_active] where activations are wanted too. 4 (or 8) bytes an activation.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError

from .activations import SparseActs


@dataclass(frozen=True, slots=True)
class LogPart:
    """What fires on the rows of one part."""

    latent: Tensor
    """[n_active] int64, ordered by row"""
    per_row: Tensor
    """[rows] int64: how many of them belong to each row"""
    value: Tensor | None
    """[n_active] float32, where they are kept"""


class ActivationLog:
    """Parts in a folder, added one after the other."""

    SUMS = ("n_parts",)

    def __init__(self, folder: Path, name: str = "fires", *, with_values: bool = False) -> None:
        self._folder, self._name, self._with_values = folder, name, with_values
        self.n_parts = 0
        """Parts that count; files beyond them are left from a pass that was killed and are written anew."""

    def add(self, active: SparseActs) -> None:
        """Append the activations of a batch."""
        arrays = {
            "latent": active.latent.int().cpu().numpy(),
            "per_row": torch.bincount(active.row, minlength=active.n_rows).int().cpu().numpy(),
        }
        if self._with_values:
            arrays["value"] = active.value.float().cpu().numpy()
        with self._path(self.n_parts).open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] -- a name may be one of its own options
            file.flush()
            os.fsync(file.fileno())
        self.n_parts += 1

    def parts(self) -> Iterator[LogPart]:
        """The parts in their order. Raises UserError when one was lost."""
        for number in range(self.n_parts):
            path = self._path(number)
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{path}, where this pass keeps what fires, cannot be read ({error}); delete the folder "
                    f"{self._folder} and run the same command again"
                ) from error
            yield LogPart(found["latent"].long(), found["per_row"].long(), found.get("value"))

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number:06d}.npz"
