"""Run a language model with a transcoder in place of the part it stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.errors import UserError
from matryoshka.hook_names import input_hook, output_hook, split_hook
from matryoshka.lm.hooks import ModuleHook
from matryoshka.lm.model import LanguageModel
from matryoshka.norms import Norm, apply_convention, fit_norm
from matryoshka.transcoder import Transcoder

_PROBE_ROWS = 8

Edit = Callable[[Tensor, Tensor], Tensor]
"""(x [..., d_in] as the transcoder reads it, target [..., d_out]) -> what goes on in the target's place."""


class _Splice:
    """What passes from the source to the target of one forward."""

    def __init__(self, transcoder: Transcoder, norm: Norm | None, edit: Edit) -> None:
        self._config = transcoder.config
        self._norm = norm
        self._edit = edit
        self._source: Tensor | None = None

    def take_raw(self, source: Tensor) -> None:
        """Keep what the transcoder reads of a raw source activation [..., d_in]."""
        config = self._config
        self._source = apply_convention(source, config.input, source_site=config.source_site, norm=self._norm)

    def take_input(self, x: Tensor) -> None:
        """Keep x [..., d_in], which is in the transcoder's convention already."""
        self._source = x

    def replace(self, target: Tensor) -> Tensor:
        """The edit of this forward's source and target, as a tensor like `target` [..., d_out]."""
        if self._source is None:
            raise UserError(
                "the model came to the transcoder's target before its source in this forward; the two sites are not of "
                "this model's order"
            )
        x, self._source = self._source, None
        return self._edit(x, target).to(device=target.device, dtype=target.dtype)


def _reconstruction(transcoder: Transcoder, n_groups: int | None) -> Edit:
    def y_hat(x: Tensor, _target: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(transcoder.device)
        return transcoder(rows, n_groups).view(*x.shape[:-1], -1)

    return y_hat


def spliced_into(transcoder: Transcoder, model: Any, n_groups: int | None = None) -> AbstractContextManager[None]:
    """While the context lasts, each forward of `model` computes y_hat from the source and goes on with it.

    Args:
        model: a `LanguageModel` (its `logits` and `capture` then see the splice), or a TransformerBridge or any other
            model with TransformerLens's `hooks(fwd_hooks=...)`, loaded without weight processing.
        n_groups: nested groups to use; all by default.

    Raises:
        UserError: the transcoder does not belong to this model, or the model cannot give what it reads.
    """
    if isinstance(model, LanguageModel):
        return edited(transcoder, model, _reconstruction(transcoder, n_groups))
    if hasattr(model, "hooks") and hasattr(model, "hook_dict"):
        splice = _Splice(transcoder, None, _reconstruction(transcoder, n_groups))
        return model.hooks(
            fwd_hooks=[
                (input_hook(transcoder.config), lambda tensor, hook: splice.take_input(tensor)),  # noqa: ARG005
                (output_hook(transcoder.config), lambda tensor, hook: splice.replace(tensor)),  # noqa: ARG005
            ]
        )
    raise UserError(
        f"a transcoder cannot be spliced into a {type(model).__name__} by itself: give a matryoshka LanguageModel or a "
        "TransformerBridge, or name the two modules of a plain model with matryoshka.lm.splice.spliced_between"
    )


@contextlib.contextmanager
def spliced_between(
    transcoder: Transcoder,
    source: nn.Module,
    target: nn.Module,
    *,
    norm: Norm | None = None,
    n_groups: int | None = None,
) -> Iterator[None]:
    """As `spliced_into`, for the modules of a plain PyTorch model.

    Args:
        source: the module that reads the raw source site: for resid_mid the norm before the MLP.
        target: the module whose output is the target site: the MLP, or the norm after it where there is one (Gemma).
        norm: what `source` computes; found out from the module when it is a norm of a known form.

    >>> block = model.model.layers[17]          # doctest: +SKIP
    >>> with spliced_between(transcoder, block.pre_feedforward_layernorm, block.post_feedforward_layernorm):
    ...     model(tokens)          # doctest: +SKIP
    """
    config = transcoder.config
    if norm is None and config.input != config.source_site:
        weight = next(source.parameters())
        reads = torch.randn(_PROBE_ROWS, config.d_in, generator=torch.Generator().manual_seed(0)).to(weight)
        with torch.no_grad():
            norm = fit_norm(source, reads, source(reads))
    splice = _Splice(transcoder, norm, _reconstruction(transcoder, n_groups))
    with contextlib.ExitStack() as stack:
        stack.callback(ModuleHook(source, "in").attach(splice.take_raw).remove)
        stack.callback(ModuleHook(target, "out").attach(splice.replace).remove)
        yield


@contextlib.contextmanager
def edited(transcoder: Transcoder, model: LanguageModel, edit: Edit) -> Iterator[None]:
    """While the context lasts, each forward of `model` goes on with `edit(x, target)` in place of the target.

    `spliced_into` is the edit that forgets the target. Raises UserError as it does.
    """
    splice = _Splice(transcoder, check_model(transcoder, model), edit)
    config = transcoder.config
    with model.hooked({config.source_hook: splice.take_raw, output_hook(config): splice.replace}):
        yield


def check_model(transcoder: Transcoder, model: LanguageModel) -> Norm | None:
    """The norm that the transcoder's input convention needs in `model`, if it needs one.

    Raises UserError when the widths, the layer or the name of the model are others than the transcoder's.
    """
    config = transcoder.config
    layer, _ = split_hook(input_hook(config))
    if model.d_model not in (config.d_in, config.d_out) or config.d_in != model.d_model:
        raise UserError(
            f"the transcoder reads {config.d_in} dimensions and {model.name} has {model.d_model}; it belongs to "
            f"{config.model or 'another model'}"
        )
    own, theirs = config.model.rpartition("/")[2].lower(), model.name.rpartition("/")[2].lower()
    if config.model_digest is not None:
        if config.model_digest != model.weights_digest:
            raise UserError(
                f"the transcoder was trained on other weights than those of {model.name} ({config.model}, digest "
                f"{config.model_digest[:8]} against {model.weights_digest[:8]})"
            )
    # A folder may be called anything, a name of the hub may not.
    elif "/" in config.model and config.model.count("/") == model.name.count("/") == 1 and own != theirs:
        raise UserError(f"the transcoder was trained on {config.model}, and this model is {model.name}")
    if config.input == config.source_site:
        return None
    norm = model.norm_before(config.source_site, layer)
    if norm is None:
        raise UserError(
            f"the transcoder reads {config.source_site} as {config.input}, and {model.name} has no norm there that "
            "reads exactly this tensor; it belongs to another model"
        )
    return norm
