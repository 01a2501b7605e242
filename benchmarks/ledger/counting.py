"""What operators ask of a device: FLOP, bytes of memory moved, kernels, waits of the host; and what is alive.

Counted at the level of ATen operators, as they are dispatched, so that the same count can be taken of real tensors and
of fake ones. The rules of an operator that is not elementwise stand beside it, with where they come from.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SECTOR = 32
"""Bytes that the memory of a GPU moves for one scattered number."""
_TOPK_KERNELS, _SORT_KERNELS = 14, 8
"""Of a top-k over many blocks (ATen/native/cuda/TensorTopK.cu, mbtopk) and of a radix sort."""

DATA_DEPENDENT = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"})
"""Operators whose shape or value the host waits for; and index by a boolean mask."""
_FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "resize_", "_unsafe_view", "lift_fresh"})
_ONLY_WRITTEN = frozenset({"zero_", "fill_", "copy_", "zeros", "full", "arange", "random_", "normal_"})


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operator on the device."""

    name: str
    phase: str
    flops: int
    flop_dtype: torch.dtype | None
    """Type of the operands of a matrix product; None for all others."""
    n_bytes: int
    n_kernels: int
    waits: bool
    """The host cannot go on before the device has come this far."""
    is_topk: bool = False


class Counter(TorchDispatchMode):
    """Notes every operator on `device`, and the bytes of the tensors that are alive there.

    `numbers`: what the host reads from fake tensors, by kind: of a boolean, an integer, a float.
    """

    def __init__(
        self,
        device: torch.device,
        phase_of: Callable[[], str] = lambda: "all",
        numbers: Mapping[type, Any] | None = None,
    ) -> None:
        super().__init__()
        self._device = device.type
        self._phase_of = phase_of
        self._numbers = numbers
        self._alive: dict[int, int] = {}
        self.operations: list[Operation] = []
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks of a fake tensor's device
            return func(*args, **kwargs)
        tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and self._numbers is not None:
            (tensor,) = tensors
            kind = bool if tensor.dtype == torch.bool else float if tensor.is_floating_point() else int
            out = self._numbers[kind]
        elif name in _FAKES and self._numbers is not None:
            out = _FAKES[name](*args)
        else:
            out = func(*args, **kwargs)
        made = [t for t in _flat(out) if isinstance(t, Tensor)]
        if any(t.device.type == self._device for t in (*tensors, *made)):
            self._note(func, name, args, kwargs, tensors, made)
        for tensor in made:
            self._watch(tensor)
        return out

    def restart(self) -> None:
        """Forget what was counted; what is alive stays, and is the first peak."""
        self.operations = []
        self.peak = self.alive

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], made: list[Tensor]) -> None:
        waits = name in DATA_DEPENDENT or (
            name == "index" and any(t.dtype == torch.bool for t in _flat(args[1]) if t is not None)
        )
        moved = name == "_to_copy" and {t.device.type for t in tensors} != {t.device.type for t in made}
        waits |= moved and not kwargs.get("non_blocking", False)
        n_kernels = 0 if name in _FREE or _is_view(func) else _KERNELS.get(name, 1)
        if not n_kernels and not waits:
            return
        count = flop_registry.get(func.overloadpacket)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=made[0]))
        self.operations.append(
            Operation(
                name=name,
                phase=self._phase_of(),
                flops=flops,
                flop_dtype=tensors[-1].dtype if flops and "out" not in kwargs else tensors[0].dtype if flops else None,
                n_bytes=_traffic(func, name, args, kwargs, made),
                n_kernels=n_kernels,
                waits=waits,
                is_topk=name == "topk",
            )
        )

    def _watch(self, tensor: Tensor) -> None:
        """Count the memory behind a tensor while it lives, once however many views there are."""
        for part in _strided(tensor):
            if part.device.type != self._device:
                continue
            storage = part.untyped_storage()
            key = id(storage)
            if key in self._alive:
                continue
            n_bytes = storage.nbytes()
            self._alive[key] = n_bytes
            self.alive += n_bytes
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.alive -= self._alive.pop(key)


def by_file(phases: Mapping[str, str], functions: Mapping[str, str], otherwise: str) -> Callable[[], str]:
    """The phase of an operator: that of the innermost frame whose function, or else whose file, is listed (names
    without .py)."""

    def phase() -> str:
        frame = sys._getframe(1)
        while frame is not None:
            name = functions.get(frame.f_code.co_name) or phases.get(Path(frame.f_code.co_filename).stem)
            if name is not None:
                return name
            frame = frame.f_back
        return otherwise

    return phase


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _strided(tensor: Tensor) -> list[Tensor]:
    """The tensor where it has memory of its own; none of a CSR matrix, whose parts are watched as they are made."""
    if tensor.layout == torch.strided:
        return [tensor]
    return []


def _size(tensor: Tensor) -> int:
    """Bytes of the distinct numbers a tensor shows: an expanded dimension is read once."""
    if tensor.layout != torch.strided:
        return 0
    return tensor.element_size() * math.prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _written(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors an operator reads and those it writes in place, out= among them, by its schema."""
    read, written = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [t for t in _flat(value) if isinstance(t, Tensor)]
        if argument.is_out:
            written += tensors
            continue
        read += tensors
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors
    return read, written


def _traffic(func: Any, name: str, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    read, written = _written(func, args, kwargs)
    if name in _ONLY_WRITTEN:
        written, read = written or made, read[1:] if name == "copy_" else []
    elif not written:
        written = made
    rule = _RULES.get(name)
    if rule is not None:
        return rule(_Moved(read, written, kwargs))
    distinct = {(id(t.untyped_storage()), t.storage_offset(), tuple(t.shape)): t for t in read if _strided(t)}
    return sum(map(_size, distinct.values())) + sum(map(_size, written))


@dataclass(frozen=True, slots=True)
class _Moved:
    """Tensors that an operator reads and writes, and its options."""

    read: list[Tensor]
    written: list[Tensor]
    options: Mapping[str, Any]


def _gathered(moved: _Moved) -> int:
    """Indices and what they choose: rows are read whole, single numbers a sector each."""
    out, table = moved.written[0], moved.read[0]
    by_row = table.ndim > 1 and out.ndim > 1 and out.shape[-1] > 1
    n_read = _size(out) if by_row else out.numel() * _SECTOR
    return _size(out) + n_read + sum(map(_size, moved.read[1:]))


def _scattered(moved: _Moved) -> int:
    """What is scattered, its indices, and a read and a write of each target: single numbers a sector each."""
    source = moved.read[-1]
    touched = 2 * _size(source) if source.ndim > 1 else 2 * _SECTOR * source.numel()
    return touched + sum(map(_size, moved.read[1:]))


def _bags(moved: _Moved) -> int:
    """Every entry reads its row of the table: a cache that held some would make it less."""
    table, indices = moved.read[0], moved.read[1]
    n_rows = indices.numel() * max(_SECTOR, table.shape[1] * table.element_size())
    return n_rows + sum(map(_size, moved.read[1:])) + sum(map(_size, moved.written))


def _sampled(moved: _Moved) -> int:
    """Each entry reads a row on the right, each row on the left is read once; then columns and values."""
    pattern, left, right = moved.read[:3]
    n_entries = pattern.numel() if pattern.layout == torch.strided else pattern._nnz()
    return n_entries * (right.shape[0] * right.element_size() + 12) + _size(left)


def _topk(moved: _Moved) -> int:
    """A radix select reads everything once for each byte of the numbers, and one and a half times to gather."""
    return int(_size(moved.read[0]) * (moved.read[0].element_size() + 1.5)) + sum(map(_size, moved.written))


def _sorted(moved: _Moved) -> int:
    """A radix sort moves keys and positions once for each byte of the key."""
    return 2 * moved.read[0].element_size() * sum(map(_size, moved.written)) + _size(moved.read[0])


def _static_nonzero(moved: _Moved) -> int:
    """Counts, then writes (ATen/native/cuda/Nonzero.cu)."""
    return 2 * _size(moved.read[0]) + sum(map(_size, moved.written))


def _adam(moved: _Moved) -> int:
    """Reads weights, gradients and both moments; writes them back, the gradients only when they are scaled."""
    sizes = [_size(t) for t in moved.written]  # weights, gradients, moments: as many of each
    n = len(sizes) // 4
    skipped = sum(sizes[n : 2 * n]) if moved.options.get("grad_scale") is None else 0
    return 2 * sum(sizes) - skipped


_RULES: dict[str, Callable[[_Moved], int]] = {
    "index": _gathered,
    "index_select": _gathered,
    "gather": _gathered,
    "scatter_add_": _scattered,
    "scatter_": _scattered,
    "index_add_": _scattered,
    "index_put_": _scattered,
    "_embedding_bag_forward_only": _bags,
    "sparse_sampled_addmm": _sampled,
    "topk": _topk,
    "sort": _sorted,
    "_fused_adam_": _adam,
    "nonzero_static": _static_nonzero,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "_fused_adam_": lambda *_: None,
    # a CSR matrix of fake tensors is its values
    "sparse_compressed_tensor": lambda *parts: parts[2],
    "sparse_sampled_addmm": lambda pattern, *_: torch.empty_like(pattern),
    "values": lambda values: torch.ops.aten.alias.default(values),
}
"""Operators for which torch has no fake kernel."""
_KERNELS = {"topk": _TOPK_KERNELS, "sort": _SORT_KERNELS, "nonzero_static": 4, "sparse_sampled_addmm": 3, "cumsum": 2}
