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
class Tap:
    """One edge of one module: its first input or its (first) output."""

    module: nn.Module
    edge: Literal["in", "out"]

    def attach(self, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `function` on the tensor each time it passes; what it returns, unless None, goes on in its place."""
        if self.edge == "out":

            def after(_module: nn.Module, _args: Any, output: Any) -> Any:
                if not isinstance(output, tuple):
                    return function(output)
                new = function(output[0])
                return None if new is None else (new, *output[1:])

            return self.module.register_forward_hook(after)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = function(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = function(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        return self.module.register_forward_pre_hook(before, with_kwargs=True)


class _AllTaken(Exception):  # noqa: N818 - it signals success
    """Ends a forward pass as soon as the last wanted tensor has been seen."""


class Captured(contextlib.AbstractContextManager["Captured"]):
    """Collects named tensors from a forward pass that runs inside it, and ends that pass after the last of them.

        with Captured(names) as captured:   # taps that call captured.take(name, tensor)
            model(tokens)
        captured.tensors

    Raises:
        UserError: the pass ended and some were never seen.
    """

    def __init__(self, names: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Wait for all of `names`, and for `optional` ones only as long as the pass lasts."""
        self.tensors: dict[str, Tensor] = {}
        self._names = list(names)
        self._n_awaited = len(self._names) + len(list(optional))

    def take(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of `tensor`, the first time its name comes by."""
        if name in self.tensors:
            return
        # A copy, because some models add to the residual stream in place; made outside inference mode, because an
        # inference tensor could never enter autograd.
        with torch.inference_mode(False), torch.no_grad():
            self.tensors[name] = tensor.detach().clone()
        if len(self.tensors) == self._n_awaited:
            raise _AllTaken

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None and (missing := [name for name in self._names if name not in self.tensors]):
            raise UserError(
                f"The model has the hook points {', '.join(missing)}, but its forward pass never reached them: these "
                "layers are built differently. Choose another layer or site."
            )
        return kind is _AllTaken
