"""The language model that a shard set was harvested from, loaded again and checked to be the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.weights_digest import differs
from matryoshka.shards import ShardSet
from matryoshka.tokens import TokenTexts

from ..config import EvaluateConfig

_SAME_ACTIVATIONS = 0.3
"""Relative L2 difference between stored and recomputed rows. bfloat16 with other kernels gives up to about 0.1, an int8
shard set 0.05; another model, or another layer of the same one, about 1."""


def weight_dtype(shards: ShardSet, config: EvaluateConfig) -> str:
    """The dtype to load the model in: that of the harvest unless another one is asked for."""
    return config.lm.dtype or str(shards.manifest.model.get("weight_dtype", "float32"))


def load_model(shards: ShardSet, config: EvaluateConfig) -> LanguageModel:
    """Load the model that the manifest of `shards` names, or `config.lm.model` where it has moved.

    Raises UserError when it cannot be loaded, or does not give the activations that the shard set holds.
    """
    facts: dict[str, Any] = shards.manifest.model
    if config.lm.model is None:
        name, revision = _found(str(facts.get("model", "")), shards.path), facts.get("revision")
    else:
        name, revision = config.lm.model, None
    try:
        model = LanguageModel.load(name, revision=revision, dtype=weight_dtype(shards, config), device=config.device)
    except UserError as error:
        raise UserError(
            f"the language model of {shards.path} is needed. {error} If it has moved, name it with --model"
        ) from error
    if (what := differs(facts, model.weights_digest, model.config_digest)) is not None:
        raise UserError(
            f"{model.name} has other {what} than the model with which {shards.path} was harvested "
            f"({facts.get('model')}): it has changed since, or it is another model. Name the right one with --model"
        )
    check_same_model(model, shards)
    return model


def check_same_model(model: LanguageModel, shards: ShardSet) -> None:
    """Raise UserError unless `model` gives the rows of the first val context again, at both sites."""
    manifest = shards.manifest
    tokens = shards.val.tokens(0)[:1].long()
    kept = shards.val.keep(0)[:, 0]
    found = model.capture(tokens, [manifest.source.hook_point, manifest.target.hook_point])
    for side, site in (("source", manifest.source), ("target", manifest.target)):
        stored = shards.val.activations(side, 0)[kept, 0].float()
        again = found[site.hook_point][0].cpu()[kept].float()
        if again.shape != stored.shape:
            raise UserError(
                f"{model.name} has {again.shape[1]} dimensions at {site.hook_point} and the rows of {shards.path} have "
                f"{stored.shape[1]}: it is another model; name the right one with --model"
            )
        difference = float((again - stored).norm() / stored.norm())
        if not difference <= _SAME_ACTIVATIONS:
            raise UserError(
                f"{model.name} does not give the activations that {shards.path} holds: at {site.hook_point} they "
                f"differ by {difference:.2f} of their norm. Its weights are others than those of the harvest "
                f"({manifest.model.get('model')}); name the right model with --model"
            )


def text_of_tokens(model: LanguageModel) -> Callable[[int], str]:
    """A function from a token id to its text, leading space included."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return lambda token: model.tokenizer.decode([token])
    return TokenTexts(backend).text


def _found(name: str, near: Path | str) -> str:
    """`name`, or the folder of that relative name beside a folder above `near`, where that is not a URL."""
    if Path(name).is_absolute():
        return name
    folders = [Path(), *(near.resolve().parents if isinstance(near, Path) else ())]
    return next((str(folder / name) for folder in folders if (folder / name / "config.json").is_file()), name)
