"""A CUDA device without a GPU: torch's FakeTensorMode, and a device guard that a build for CPUs leaves out.

Fake tensors have shapes, dtypes and a device but no values. On a torch without CUDA, operators that switch devices
(indexing, copy_, reading a number) still fail, since no guard for CUDA is linked. FakeTensorMode replaces a guard that
finds no devices by one that does nothing, but not a missing one; so the guard of the meta device, which does nothing
either, is entered for CUDA while fake tensors are made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda", 0)
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META = 1, 14
"""Positions in c10::DeviceType."""


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """Everything made in this context is fake. Gives the device that stands for a GPU."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _REGISTRY)
    own = guards[_CUDA]
    guards[_CUDA] = own or guards[_META]
    try:
        with FakeTensorMode():
            yield CUDA
    finally:
        guards[_CUDA] = own
