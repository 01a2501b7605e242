"""What to say when a language model cannot be loaded."""

from __future__ import annotations

from pathlib import Path

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
