"""The hook points of one loaded model: which exist, and where each lies among the model's modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from matryoshka.errors import UserError
from matryoshka.sites import SITES, hook_point
from matryoshka.taps import Tap


class HookPoints:
    """What a `TransformerBridge` knows about the names of a model's tensors.

    The bridge wraps modules of a Hugging Face model in place; `plain` is a copy of that model with the modules as they
    were. So a hook point that is the input or output of a wrapped module is found at the same place in `plain`.
    """

    def __init__(self, bridge: Any, plain: Any, paths: Mapping[nn.Module, str], name: str) -> None:
        """`paths`: module that the bridge wraps -> its path, the same in `plain`; `name`: for messages."""
        self._bridge = bridge
        self._plain = plain
        self._paths = dict(paths)
        self._name = name
        self._n_layers = len(bridge.blocks)

    def require(self, name: str) -> None:
        """Raise UserError unless the model has this hook point."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            if name in self._bridge.hook_dict:
                return
            raise UserError(
                f'"{name}" is not a hook point of {self._name}. Its blocks have, for each layer from 0 to '
                f"{self._n_layers - 1}, {', '.join(self.sites_of(0))}, written as in {hook_point('resid_post', 0)}."
            )
        layer, rest = int(match[1]), match[2]
        if layer >= self._n_layers:
            raise UserError(
                f"There is no layer {layer}: {self._name} has {self._n_layers} layers, 0 to {self._n_layers - 1}."
            )
        if rest.removeprefix("hook_") in self.sites_of(layer) or name in self._bridge.hook_dict:
            return
        if rest == "hook_resid_mid" and self._is_parallel(layer):
            raise UserError(
                f"{self._name} has no resid_mid: its attention and its MLP read the same input and are added together "
                "(parallel blocks), so there is no residual stream between the two. Use resid_pre as the source."
            )
        raise UserError(
            f'"{rest.removeprefix("hook_")}" is not a site of layer {layer} of {self._name}, which has '
            f"{self._n_layers} layers. The sites there are {', '.join(self.sites_of(layer))}."
        )

    def sites_of(self, layer: int) -> list[str]:
        """The sites that this layer has."""
        block = self._bridge.blocks[layer]
        own = {name for name, _ in block.named_children()}
        return [s for s in SITES if f"hook_{s}" in block.hook_aliases or f"hook_{s}" in own]

    def _is_parallel(self, layer: int) -> bool:
        named = "Parallel" in type(self._bridge.blocks[layer]).__name__
        return named or bool(getattr(self._bridge.cfg, "parallel_attn_mlp", False))

    def trace(self, name: str) -> tuple[Tap, Tap] | None:
        """Follow a hook point through the bridge to an edge of one module: (in the plain tree, in the bridged one).

        None where the hook point is not simply the input or output of a module that stands for a plain one.
        """
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            return None
        wrapper: Any = self._bridge.blocks[int(match[1])]
        target = wrapper.hook_aliases.get(match[2], match[2])
        if not isinstance(target, str):
            return None
        *parts, last = target.split(".")
        for part in parts:
            wrapper = getattr(wrapper, part, None)
        module = getattr(wrapper, "original_component", None)
        path = None if module is None else self._paths.get(module)
        if path is None or last not in ("hook_in", "hook_out"):
            return None
        edge = "in" if last == "hook_in" else "out"
        return Tap(self._plain.get_submodule(path), edge), Tap(wrapper, edge)
