"""Read a model and its tokenizer from the hub, its cache, or a folder.

Of a multi-modal model the text model alone is read: what encodes images or sound takes no part in a text's forward.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from matryoshka.errors import UserError
from matryoshka.lm.failures import cannot_load

# The names that a multi-modal model's files give to its text model, and those of the text model alone.
_TEXT_MODEL_KEYS = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers and transformer_lens do to bars, logs and warning filters to the time of a load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handlers = list(logging.root.handlers)
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from transformers.utils import logging as transformers_logging

        bars = transformers_logging.is_progress_bar_enabled()
        hub_bars = not are_progress_bars_disabled()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        if hub_bars:  # a download of gigabytes keeps its bar
            enable_progress_bars()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()
            logging.root.handlers[:] = [h for h in logging.root.handlers if h in handlers]


def load_model(name: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The Hugging Face model, read-only on `device`, and its tokenizer, both of one commit."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    part = "configuration"
    try:
        config = AutoConfig.from_pretrained(name, **where)
        where["revision"] = getattr(config, "_commit_hash", None) or revision
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        part = "weights"
        text_config = config.get_text_config()
        if text_config is not config:
            if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise ValueError(
                    f"it is a multi-modal {config.model_type}, and transformers cannot read its text model by itself."
                )
            # Whether the head is the embedding is what the whole model's configuration says.
            text_config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
            config, where["key_mapping"] = text_config, _TEXT_MODEL_KEYS
        # The default is sdpa where it is exact. It has no soft cap, and not every version of transformers knows that.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        where |= {"attn_implementation": "eager"} if capped else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
        )
        model, report = loaded
        model = model.to(device).eval().requires_grad_(False)
    except Exception as error:
        # Reading a model runs a great deal of other people's code, which fails in any way on what it does not know.
        raise cannot_load(name, revision, part, error) from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"The weight files of {name} do not fit its architecture: {len(absent)} tensors are missing or of another "
            f"shape ({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}), and would be random. Download or "
            "convert the model again."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise cannot_load(name, revision, "tokenizer", ValueError("it has no words, only special tokens"))
    return model, tokenizer
