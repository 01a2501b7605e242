"""What to say when a language model cannot be loaded, run, or read at some hook point."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from matryoshka.errors import UserError


def cannot_load(name: str, revision: str | None, part: str, error: Exception) -> UserError:
    """The error for `part` (configuration, tokenizer or weights) of the model `name`, because of `error`."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= 300 else reason[:297] + "..."
    if Path(name).is_dir():
        return UserError(
            f"The {part} of the model in the folder {name} could not be loaded: {reason} Expected is a folder as "
            "save_pretrained writes it: config.json, *.safetensors and the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json), of an architecture that transformers knows without the model's own code."
        )
    at = f" at revision {revision}" if revision else ""
    return UserError(
        f'The {part} of the model "{name}"{at} could not be loaded, neither from the Hugging Face hub nor from its '
        f"cache, and it is not a folder here: {reason} Check the name; for a gated model (Gemma, Llama) accept its "
        "licence on its page at huggingface.co and set HF_TOKEN; without a network give the path of a local folder; "
        "with the model in the cache set HF_HUB_OFFLINE=1. Only safetensors weights are loaded, and never a model's "
        "own code."
    )


def forward_failed(name: str, architecture: str, error: Exception) -> UserError:
    """The error for a forward pass that failed inside the model's own code."""
    reason = " ".join(str(error).split())[:300] or "no reason given"
    return UserError(
        f"The forward pass of {name}, a {architecture} of transformers, failed in its own code with "
        f"{type(error).__name__}: {reason} Check that transformers runs this model by itself (another version may, or "
        "may need a package that it names); else use another model."
    )


def not_finite(name: str, model: nn.Module) -> UserError:
    """The error for a model whose logits are not all finite."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    broken = [key for key, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        return UserError(
            f"{len(broken)} weights of {name} hold NaN or infinity in {dtype} ({', '.join(broken[:3])}"
            f"{', ...' if len(broken) > 3 else ''}), so that all it computes is NaN. "
            + (
                "Use --dtype bf16 or fp32 if its files hold finite ones; else download"
                if dtype == "float16"
                else "Download"
            )
            + " or convert the model again."
        )
    wider = {"float16": "Use --dtype bf16 or fp32.", "bfloat16": "Use --dtype fp32."}
    return UserError(
        f"The forward pass of {name} overflows in {dtype}: its logits are not finite, though its weights are. "
        + wider.get(dtype, "No wider dtype is offered: download or convert the model again, or use another one.")
    )


def refusal(name: str, point: str, reason: str) -> UserError:
    """The error for a hook point whose tensor is not what the hook point says."""
    layer, site = point.removeprefix("blocks.").split(".hook_")
    if reason == parallel(name):
        return UserError(reason)
    return UserError(
        f"{site} of layer {layer} cannot be read from {name}: in its plain forward {reason}. Its block is built in "
        "another way than this name says; use other sites (--source resid_pre --target resid_post needs nothing of "
        "the block's inside) or another model."
    )


def parallel(name: str) -> str:
    """Why a model of parallel blocks has no resid_mid."""
    return (
        f"{name} has no resid_mid: its attention and its MLP read the same input and are added together "
        "(parallel blocks), so there is no residual stream between the two. Use resid_pre as the source."
    )


def not_causal(name: str, difference: float) -> UserError:
    """The error for a model in which a token changes what comes before it."""
    return UserError(
        f"{name} is not a causal language model: when the last token of a context is changed, its logits at the tokens "
        f"before change by {difference:.2g} of their norm. Use a decoder-only model that reads from left to right."
    )
