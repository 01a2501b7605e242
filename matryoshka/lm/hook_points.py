"""The hook points of one loaded model: which exist, and which edge of which of its modules each one is.

TransformerLens describes every architecture that it knows: which module is the attention, the MLP, the norm before it,
and which edge of them a name such as `hook_mlp_out` means. Only that description is read. A TransformerBridge is never
booted: booting may install packages, and the forward of a bridge is its own, which for some architectures (DeepSeek-V2,
Falcon with alibi) is not the model's.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from matryoshka.errors import UserError
from matryoshka.lm.failures import parallel
from matryoshka.lm.hooks import ModuleHook
from matryoshka.sites import SITES, hook_point

_NORMS = {"resid_mid": "ln2", "resid_pre": "ln1"}
_SUBLAYERS = {"resid_mid": ("mlp",), "resid_pre": ("attn", "linear_attn", "mamba", "mixer", "ssm")}
"""What may follow each site: a layer of a hybrid model has one or another of them."""


class HookPoints:
    """What TransformerLens knows about the modules of `model`, a plain Hugging Face model."""

    def __init__(self, model: Any, name: str) -> None:
        """`name`: of the model, for messages. Raises UserError for an architecture that TransformerLens does not know,
        and for one that is not a stack of decoder blocks."""
        self._name = name
        settings, components = _description(model, name)
        template = components.get("blocks")
        blocks = None if template is None else _module_at(model, template.name)
        if template is None or not isinstance(blocks, nn.ModuleList):
            raise UserError(
                f"{name} is a {type(model).__name__}, which is not a stack of decoder blocks. Use one that is."
            )
        self.blocks = blocks
        self._components = [_of_layer(template, block) for block in blocks]
        final_norm = components.get("ln_final")
        self.final_norm = None if final_norm is None else _module_at(model, final_norm.name)
        self.n_ctx = int(settings.n_ctx)
        self.d_model = int(settings.d_model)

    def require(self, name: str) -> None:
        """Raise UserError unless the model has this hook point."""
        if self.trace(name) is not None:
            return
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        n_layers = len(self.blocks)
        if match is None:
            raise UserError(
                f'"{name}" is not a hook point of {self._name} that can be read. Its blocks have, for each layer from '
                f"0 to {n_layers - 1}, {', '.join(self.sites_of(0))}, written as in {hook_point('resid_post', 0)}."
            )
        layer, rest = int(match[1]), match[2]
        if layer >= n_layers:
            raise UserError(f"There is no layer {layer}: {self._name} has {n_layers} layers, 0 to {n_layers - 1}.")
        if rest == "hook_resid_mid" and self.is_parallel(layer):
            raise UserError(parallel(self._name))
        raise UserError(
            f'"{rest.removeprefix("hook_")}" is not a site of layer {layer} of {self._name}, which has '
            f"{n_layers} layers, nor the input or output of one of its modules. The sites there are "
            f"{', '.join(self.sites_of(layer)) or 'none'}."
        )

    def sites_of(self, layer: int) -> list[str]:
        """The sites that this layer has."""
        return [site for site in SITES if self.trace(hook_point(site, layer)) is not None]

    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP read the same input, so that there is no resid_mid."""
        return "Parallel" in type(self._components[layer]).__name__

    def trace(self, name: str) -> ModuleHook | None:
        """The edge of the module that this hook point is, or None where it is none."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None or int(match[1]) >= len(self.blocks):
            return None
        layer, rest = int(match[1]), match[2]
        component: Any = self._components[layer]
        scaled = {"hook_attn_out": "scaled_attn_submodule", "hook_mlp_out": "scaled_mlp_submodule"}.get(rest)
        if scaled is not None and (submodule := getattr(component, scaled, None)) is not None:
            module = self._find(layer, (submodule,))
            return None if module is None else ModuleHook(module, "out", component.residual_contribution_scale)
        target = component.hook_aliases.get(rest, rest)
        if not isinstance(target, str):
            return None
        *path, edge = target.split(".")
        if edge not in ("hook_in", "hook_out"):
            return None
        module = self._find(layer, tuple(path))
        return None if module is None else ModuleHook(module, "in" if edge == "hook_in" else "out")

    def norm_before(self, site: str, layer: int) -> nn.Module | None:
        """The norm that TransformerLens has between this site and the sublayer that follows it."""
        return self._find(layer, (_NORMS[site],))

    def sublayer_input(self, site: str, layer: int) -> ModuleHook | None:
        """What the sublayer after this site reads."""
        for name in _SUBLAYERS[site]:
            # Where the MLP is no module of its own (OPT), its first matrix reads for it.
            for path in ((name,), (name, "in")):
                if (module := self._find(layer, path)) is not None:
                    return ModuleHook(module, "in")
        return None

    def _find(self, layer: int, path: tuple[str, ...]) -> nn.Module | None:
        """The module of the block that a path of TransformerLens's components leads to; the block for no path."""
        component, module = self._components[layer], self.blocks[layer]
        for part in path:
            component = component.submodules.get(part)
            if component is None:
                return None
            if component.name is None and part == path[-1]:
                return None  # a name for several modules, none of which is the whole
            if component.name is not None:
                module = _module_at(module, component.name)
                if module is None:
                    return None
        return module


def _description(model: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """(sizes, components by name) of what TransformerLens calls the adapter of an architecture; it has no weights."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    # The class that was loaded decides, whatever the configuration calls itself (text models of multi-modal ones).
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    try:
        architecture = determine_architecture_from_hf_config(config)
        described = build_bridge_config_from_hf(config, architecture, name, model.dtype)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(described)
        return adapter.cfg, dict(adapter.get_component_mapping())
    except Exception as error:
        # A description may fail in any way on a configuration that its author did not think of.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"TransformerLens does not know {name}, a {type(model).__name__}, so which of its modules a hook "
            f"point is cannot be known: {reason} Use a model of an architecture that its TransformerBridge supports."
        ) from error


def _of_layer(template: Any, block: nn.Module) -> Any:
    """The description of one block: blocks of hybrid models differ in what their names mean."""
    component = copy.deepcopy(template)
    component.set_original_component(block)
    return component


def _module_at(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module
