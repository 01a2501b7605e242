"""A killed pass over many rows continues from its last saved state: its sums are saved to the disk now and then.

The sums of a pass are objects that hold numbers, tensors and other such objects. Nothing here knows them: `state_of`
walks through them (through the fields of a dataclass, or the names in the attribute SUMS of another class) and gives
flat arrays; `load_state` puts such arrays back. A pass that continues from a saved state adds the same batches in the
same order to the same sums, so that its result has the same bytes as one that nobody stopped.

    report.partial/pass.npz     the sums, the rows that are in them, and the identity of the result
    report.partial/.lock        held while a process works on it

The folder (here that of report.json) goes when the result is published.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.interrupt import StopRequest
from matryoshka.runs import changed_fields, exclusive, fsync_path, make_directory

STATE_FILE = "pass.npz"
STATE_VERSION = 1
_IDENTITY, _N_ROWS = "identity", "n_rows"
_SUMS = "sums."


def state_of(sums: Any) -> dict[str, np.ndarray]:
    """Every number and tensor in `sums` by its dotted name; None is an empty array of bools."""
    state: dict[str, np.ndarray] = {}
    for name, value in _parts(sums):
        if value is None:
            state[name] = np.zeros(0, dtype=bool)
        elif isinstance(value, Tensor):
            assert value.ndim > 0
            state[name] = value.detach().cpu().numpy()
        elif isinstance(value, (int, float)):
            state[name] = np.asarray(value, dtype=np.int64 if isinstance(value, int) else np.float64)
        else:
            state |= {f"{name}.{inner}": array for inner, array in state_of(value).items()}
    return state


def load_state(sums: Any, state: Mapping[str, np.ndarray]) -> None:
    """Put back what `state_of` gave; `sums` was made in the same way, so that the names are the same."""
    for name, value in _parts(sums):
        if name in state:
            new = _restored(state[name], value)
            if isinstance(sums, list):
                sums[int(name)] = new
            else:
                setattr(sums, name, new)
        else:
            start = name + "."
            load_state(value, {key.removeprefix(start): a for key, a in state.items() if key.startswith(start)})


def _parts(sums: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(sums, list):
        yield from ((str(index), value) for index, value in enumerate(sums))
        return
    names = getattr(type(sums), "SUMS", None)
    assert names is not None or is_dataclass(sums), f"{type(sums).__name__} does not say what it sums up"
    for name in [each.name for each in fields(sums)] if names is None else names:
        value = getattr(sums, name)
        # A choice, made when the pass began and part of its identity.
        if not isinstance(value, (str, tuple, bool)):
            yield name, value


def _restored(array: np.ndarray, old: Any) -> Any:
    if array.dtype == bool and array.shape == (0,) and not isinstance(old, Tensor):
        return None
    if array.ndim == 0:
        return array.item()
    # In torch's own memory, not numpy's: a dot product may differ in its last bit with the alignment of its operands.
    tensor = torch.from_numpy(array).clone()
    return tensor.to(old.device) if isinstance(old, Tensor) else tensor


@dataclass
class ResumablePass:
    """The saved state of one pass; made by `resumable_pass`."""

    folder: Path
    identity: Mapping[str, Any]
    every_seconds: float
    changes: tuple[str, ...] = ()
    """How an older pass, which is dropped, differed from this one."""
    n_resumed: int = 0
    """Rows that were done already."""
    _saved: float = 0.0
    _stop: StopRequest = field(default_factory=StopRequest)

    def load(self, sums: Any) -> int:
        """Fill `sums` with what was saved and give the number of rows in them; 0 when there is no saved state.

        A state of other settings, or one that cannot be read, is dropped.
        """
        # From here on a signal waits for the end of the batch, so that what is saved is whole.
        self._stop.__enter__()
        self._saved = time.monotonic()
        content = _read(self.folder / STATE_FILE)
        if content is None:
            return 0
        identity = json.loads(bytes(content.pop(_IDENTITY)).decode())
        self.changes = tuple(changed_fields(identity, self._full_identity()))
        n_rows = int(content.pop(_N_ROWS))
        state = {name.removeprefix(_SUMS): array for name, array in content.items()}
        if self.changes or state.keys() != state_of(sums).keys():
            return 0
        load_state(sums, state)
        self.n_resumed = n_rows
        return n_rows

    def save_when_due(self, sums: Any, n_rows: int) -> bool:
        """Save `sums` of `n_rows` rows, when the last time is long enough ago; whether it was.

        A signal that has come during the batch is taken now, after saving.
        """
        if self._stop.signal is not None:
            self.save(sums, n_rows)
            self._stop.deliver()
        if time.monotonic() - self._saved < self.every_seconds:
            return False
        self.save(sums, n_rows)
        return True

    def save(self, sums: Any, n_rows: int) -> None:
        """Save `sums` so that they are seen whole or not at all."""
        identity = json.dumps(self._full_identity(), sort_keys=True).encode()
        content = {_SUMS + name: array for name, array in state_of(sums).items()}
        content |= {_IDENTITY: np.frombuffer(identity, dtype=np.uint8), _N_ROWS: np.asarray(n_rows, dtype=np.int64)}
        temporary = self.folder / (STATE_FILE + ".aside")
        with temporary.open("wb") as file:
            np.savez(file, **content)  # pyright: ignore[reportArgumentType] -- a name may be one of its own options
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / STATE_FILE)
        fsync_path(self.folder)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Take signals as they come again."""
        self._stop.__exit__(None, None, None)

    def deliver(self) -> None:
        """Take a signal that has come when the pass was over."""
        if self._stop.signal is not None:
            self._stop.deliver()

    def _full_identity(self) -> dict[str, Any]:
        # Through JSON, as it is read back: tuples become lists.
        return json.loads(json.dumps({**self.identity, "state_version": STATE_VERSION}))


@contextmanager
def resumable_pass(result: Path, identity: Mapping[str, Any], save_minutes: float) -> Iterator[ResumablePass]:
    """The folder beside `result` for the pass that ends in it, held alone; removed when the context ends well.

    What is in it stays when something was saved there; else it goes too. Raises UserError when another process is at
    the same result.
    """
    # Not result.json.partial, which is the file that becomes the result.
    folder = result.with_suffix(".partial")
    make_directory(folder)
    with exclusive(folder):
        saved = ResumablePass(folder, identity, save_minutes * 60)
        try:
            yield saved
        finally:
            saved.close()
        shutil.rmtree(folder)
    saved.deliver()


class Parts:
    """The parts of a result that are done, each by its name: for work that is no pass over rows."""

    SUMS = ("content",)

    def __init__(self, saved: ResumablePass) -> None:
        self._saved, self._parts = saved, dict[str, Any]()
        saved.load(self)

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """What JSON keeps of the part `name`: it was saved, or `make` gives it now."""
        if name not in self._parts:
            self._parts[name] = json.loads(json.dumps(make()))
            self._saved.save_when_due(self, len(self._parts))
        return self._parts[name]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    @property
    def content(self) -> Tensor:
        """All of them as bytes, uint8 [n]."""
        return torch.frombuffer(bytearray(json.dumps(self._parts).encode()), dtype=torch.uint8)

    @content.setter
    def content(self, content: Tensor) -> None:
        self._parts = json.loads(bytes(content.numpy()))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        # A file of our own: np.load leaves the one it opens open when it cannot read it.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return content if {_IDENTITY, _N_ROWS} <= content.keys() else None
