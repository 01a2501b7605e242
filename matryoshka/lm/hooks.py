"""Read, or replace, the tensor that passes one edge of a module during a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from matryoshka.errors import UserError


@dataclass(frozen=True)
class ModuleHook:
    """One edge of one module: its first input or its (first) output, times `scale`.

    The scale is that of models which multiply what a sublayer gives before they add it (Granite's
    residual_multiplier): what is added to the residual stream is then no module's output as it stands.
    """

    module: nn.Module
    edge: Literal["in", "out"]
    scale: float = 1.0

    def attach(self, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `function` on the tensor each time it passes; what it returns, unless None, goes on in its place."""
        if self.edge == "out":

            def after(_module: nn.Module, _args: Any, output: Any) -> Any:
                if not isinstance(output, tuple | list):
                    return self._apply(function, output)
                new = self._apply(function, output[0])
                return None if new is None else type(output)([new, *output[1:]])

            return self.module.register_forward_hook(after)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = self._apply(function, args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
            new = None if name is None else self._apply(function, kwargs[name])
            return None if name is None or new is None else (args, {**kwargs, name: new})

        return self.module.register_forward_pre_hook(before, with_kwargs=True)

    def _apply(self, function: Callable[[Tensor], Tensor | None], tensor: Any) -> Tensor | None:
        if not isinstance(tensor, Tensor):  # nothing to read here
            return None
        if self.scale == 1:
            return function(tensor)
        new = function(tensor * self.scale)
        return None if new is None else new / self.scale


class _AllRecorded(Exception):  # noqa: N818 - it signals success
    """Ends a forward pass as soon as the last wanted tensor has been seen."""


class Recorder(contextlib.AbstractContextManager["Recorder"]):
    """Collects named tensors from a forward pass that runs inside it, and ends that pass after the last of them.

        with Recorder(names) as recorder:   # hooks that call recorder.record(name, tensor)
            model(tokens)
        recorder.tensors

    Raises:
        UserError: the pass ended and some were never seen.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names = list(names)

    def record(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of `tensor`, the first time its name comes by."""
        if name in self.tensors:
            return
        # A copy, because some models add to the residual stream in place; made outside inference mode, because an
        # inference tensor could never enter autograd.
        with torch.inference_mode(False), torch.no_grad():
            self.tensors[name] = tensor.detach().clone()
        if len(self.tensors) == len(self._names):
            raise _AllRecorded

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None and (missing := [name for name in self._names if name not in self.tensors]):
            raise UserError(
                f"The model has the hook points {', '.join(missing)}, but its forward pass never reached them: these "
                "layers are built differently. Choose another layer or site."
            )
        return kind is _AllRecorded
