"""Every decoder-only architecture that transformers and TransformerLens know: read as its plain forward has it, or
refused with a reason.

The table says what is expected of each, so that a change of either library that moves a site fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.hook_names import ADDS_ITS_MLP
from matryoshka.lm import LanguageModel
from matryoshka.lm.hook_points import HookPoints
from matryoshka.norms import apply_convention
from matryoshka.sites import SITES, hook_point

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 24),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 40),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    "sliding_window": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_ssm": 48,
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0,
}
"""Taken by each configuration as far as it has such a setting."""

ALL = "pre attn mid mlp post, norms after pre mid"
NO_NORM = "pre attn mid mlp post, norms after -"
PARALLEL = "pre attn mlp post, norms after pre"
STREAM = "pre post, norms after -"
MIXER = "pre mid mlp post, norms after pre mid"
"""What of a layer can be read, and after which of its sites a norm was recognised."""

HOOKS = ("mlp.hook_out", "hook_mlp_out")

LIKE_LLAMA = """
    afmoe apertus arcee bitnet bloom deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe gemma gemma2 gemma3_text glm glm4
    glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_oss hunyuan_v1_dense jais2 jetmoe laguna llama minimax_m2 ministral3
    mistral mixtral mpt nanochat nemotron olmo olmoe opt phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm
    starcoder2 vaultgemma xglm youtu
"""
SIDE_BY_SIDE = ("codegen", "cohere", "cohere2", "falcon", "gpt_neox", "gptj")
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CASES: dict[str, tuple[str, dict[str, Any], str | list[str]]] = {
    **{model_type: (model_type, {}, ALL) for model_type in LIKE_LLAMA.split()},
    "llama4_text": ("llama4_text", {"intermediate_size_mlp": 40}, ALL),
    "gpt_neo": ("gpt_neo", {"num_heads": 4, "attention_types": [[["global", "local"], 1]]}, ALL),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "head_dim": 4, "index_topk": 16},
        ALL,
    ),
    # what a sublayer gives is multiplied before it is added
    "granite": ("granite", {"residual_multiplier": 0.25}, ALL),
    "granitemoe": ("granitemoe", {"residual_multiplier": 0.25}, ALL),
    # more is added after the MLP
    "gemma4_text": ("gemma4_text", {}, ALL + ", adds more"),
    "gemma4_text without per-layer inputs": ("gemma4_text", {"hidden_size_per_layer_input": 0}, ALL),
    # norms after the sublayers, inside their branch
    **{model_type: (model_type, {}, NO_NORM) for model_type in ("exaone4", "flex_olmo", "olmo2", "olmo3")},
    "modernbert-decoder": ("modernbert-decoder", {}, [ALL.replace("after pre", "after"), ALL]),
    # norms after the sublayers, in the stream itself: nothing inside a block is what its name says
    "opt with norms after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, STREAM),
    "openai-gpt": ("openai-gpt", {}, STREAM),
    # attention and MLP side by side, and the same classes one after the other
    **{model_type: (model_type, {}, PARALLEL) for model_type in SIDE_BY_SIDE},
    "phi": ("phi", {"partial_rotary_factor": 0.67}, PARALLEL),
    "falcon with alibi": ("falcon", {"alibi": True}, PARALLEL),
    "falcon, new": ("falcon", {"new_decoder_architecture": True}, PARALLEL),
    "falcon with alibi, sequential": ("falcon", {"alibi": True, "parallel_attn": False}, ALL),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}, ALL),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}, PARALLEL),
    # hybrids: a layer has attention or something else
    "bamba": ("bamba", {"attn_layer_indices": [1]}, [MIXER, ALL]),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
        [MIXER, ALL],
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, [MIXER.replace("after pre", "after"), ALL]),
    "lfm2_moe": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        [MIXER.replace("after pre", "after"), ALL],
    ),
    **{name: (name, HYBRID, [MIXER, ALL]) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "olmo_hybrid": ("olmo_hybrid", HYBRID, [PARALLEL, PARALLEL.replace("after pre", "after -")]),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "residual_multiplier": 0.25},
        ["pre post, norms after pre", "pre attn mid post, norms after pre"],
    ),
    # a state-space path beside the attention: attn_out is not all that is added before the MLP
    "falcon_h1": ("falcon_h1", {}, MIXER),
    # no attention and MLP that TransformerLens could name
    **{model_type: (model_type, {}, STREAM) for model_type in ("falcon_mamba", "mamba", "nemotron_h", "rwkv")},
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 12, "n_groups": 1, "state_size": 8, "chunk_size": 8}, STREAM),
    "recurrent_gemma": ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}, STREAM),
    "zamba2": (
        "zamba2",
        {
            "num_mem_blocks": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 12,
            "mamba_ngroups": 1,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
        },
        STREAM,
    ),
    "deepseek_v4": ("deepseek_v4", {}, "-, norms after -"),
}
"""Name -> model type, settings beside the small ones, and what every layer (or each) has."""

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", {}, "is not a causal language model"),
    "hrm_text": ("hrm_text", {}, "is not a stack of decoder blocks"),
    "ctrl": ("ctrl", {"dff": 40}, "TransformerLens does not know .* a CTRLLMHeadModel"),
    "biogpt": ("biogpt", {}, "TransformerLens does not know .* a BioGptForCausalLM"),
}
"""As CASES, with what the refusal says."""


pytestmark = pytest.mark.usefixtures("no_process")


def config_of(model_type: str, settings: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(config_class).parameters, *getattr(config_class, "__dataclass_fields__", {})}
    return config_class(**{key: value for key, value in SMALL.items() if key in known} | settings)


def build(save: Callable[[Any, Any], Path], model_type: str, settings: dict[str, Any]) -> Path:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = config_of(model_type, settings)
    return save(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


def outcome(model: LanguageModel) -> list[str]:
    """What of each layer can be read, as the table writes it."""
    lines = []
    for layer in range(model.n_layers):
        sites = model.sites_of(layer)
        norms = [site for site in sites if model.norm_before(site, layer) is not None]
        short = [
            " ".join(name.removeprefix("resid_").removesuffix("_out") for name in some) or "-"
            for some in (sites, norms)
        ]
        lines.append(f"{short[0]}, norms after {short[1]}{', adds more' if model.adds_more(layer) else ''}")
    return lines


def tokens_of(n_contexts: int, ctx_len: int) -> torch.Tensor:
    return torch.randint(4, 97, (n_contexts, ctx_len), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", CASES)
def test_what_is_captured_is_the_plain_forwards(name: str, save_tiny_model: Callable[[Any, Any], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model_type, settings, expected = CASES[name]
    folder = build(save_tiny_model, model_type, settings)
    model = LanguageModel.load(str(folder), dtype="float32", device="cpu")
    assert outcome(model) == (expected if isinstance(expected, list) else [expected] * model.n_layers)
    in_16_bits = LanguageModel.load(str(folder), dtype="bfloat16", device="cpu")
    assert outcome(in_16_bits) == outcome(model)

    # other tokens than those of the check, on a model that was loaded apart
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokens_of(3, 13)
    with torch.inference_mode():
        output = plain(tokens, output_hidden_states=True, use_cache=False)
    hidden = list(output.hidden_states or ())
    assert torch.equal(model.logits(tokens), output.logits)
    points = [hook_point(site, layer) for layer in range(model.n_layers) for site in model.sites_of(layer)]
    seen = model.capture(tokens, points)
    for layer in range(model.n_layers):
        pre, attn, mid, mlp, post = (seen.get(hook_point(site, layer)) for site in SITES)
        # of the last layer only the norm of resid_post is a hidden state
        if layer + 1 < model.n_layers and post is not None:
            assert any(torch.equal(post, state) for state in hidden)
        if layer > 0 and pre is not None:
            assert torch.equal(pre, seen[hook_point("resid_post", layer - 1)])
        if mid is None and attn is not None:
            torch.testing.assert_close(pre + attn + mlp, post)
        if mid is not None and attn is not None:
            torch.testing.assert_close(pre + attn, mid)
        if mid is not None and mlp is not None and not model.adds_more(layer):
            torch.testing.assert_close(mid + mlp, post)
        for site in model.sites_of(layer):
            if (norm := model.norm_before(site, layer)) is not None:
                convention = "mlp_in" if site == "resid_mid" else "attn_in"
                raw = seen[hook_point(site, layer)]
                u = apply_convention(raw, convention, source_site=site, norm=norm)
                torch.testing.assert_close(
                    u, read_by_the_sublayer(model, plain, site, layer, tokens), atol=1e-5, rtol=1e-5
                )
    edits = {name: lambda t: t.clone() for name in points if not name.endswith("resid_mid")}
    torch.testing.assert_close(model.logits(tokens, edits), output.logits)
    for layer in range(model.n_layers):
        for site in set(SITES) - set(model.sites_of(layer)):
            with pytest.raises(UserError, match=f"{site}|parallel blocks"):
                model.capture(tokens, [hook_point(site, layer)])


def test_which_models_add_the_output_of_their_mlp_as_it_is() -> None:
    """What other projects call mlp.hook_out is then hook_mlp_out; the list has these classes and no other."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found: dict[str, bool] = {}
    for name, (model_type, settings, expected) in CASES.items():
        config = config_of(model_type, settings)
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        points = HookPoints(model, name)
        edges = [[points.trace(f"blocks.{i}.{hook}") for hook in HOOKS] for i in range(len(points.blocks))]
        readable = "mlp" in str(expected)
        is_added = readable and all(own is not None and own == added for own, added in edges)
        found[type(model).__name__] = found.get(type(model).__name__, is_added) and is_added
    assert {name for name, is_added in found.items() if is_added} == ADDS_ITS_MLP


# --- the text models of multi-modal ones ------------------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24}
MULTI_MODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str | list[str]]] = {
    "gemma3": ("gemma3_text", {}, VISION | IMAGES, {"mm_tokens_per_image": 4}, ALL),
    "gemma4": (
        "gemma4_text",
        {},
        VISION | {"num_key_value_heads": 2, "head_dim": 8},
        {"audio_config": None},
        ALL + ", adds more",
    ),
    "llama4": (
        "llama4_text",
        {"intermediate_size_mlp": 40},
        VISION | IMAGES | {"projector_input_dim": 20, "projector_output_dim": 20, "vision_output_dim": 20},
        {},
        ALL,
    ),
    "llava": ("llama", {}, VISION | IMAGES | {"model_type": "clip_vision_model", "projection_dim": 16}, {}, ALL),
    "mistral3": ("mistral", {}, VISION | IMAGES | {"model_type": "pixtral"}, {}, ALL),
    "qwen3_5": ("qwen3_5_text", HYBRID, QWEN_VISION, {}, [MIXER, ALL]),
}
"""Model type -> that of its text model, settings of the text model, of the vision model and of the whole, outcome."""


@pytest.mark.parametrize("name", MULTI_MODAL)
def test_the_text_model_of_a_multi_modal_one_is_loaded_alone(
    name: str, save_tiny_model: Callable[[Any, Any], Path]
) -> None:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text_type, text, vision, settings, expected = MULTI_MODAL[name]
    config_class: Any = CONFIG_MAPPING[name]
    inner = config_of(text_type, text).to_dict()
    config = config_class(text_config=inner, vision_config=vision, **settings)
    whole_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    folder = save_tiny_model(whole_class, config)
    model = LanguageModel.load(str(folder), dtype="float32", device="cpu")
    assert outcome(model) == (expected if isinstance(expected, list) else [expected] * model.n_layers)
    whole = whole_class.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.n_params < sum(parameter.numel() for parameter in whole.parameters())
    with torch.inference_mode():
        assert torch.equal(model.logits(tokens_of(3, 13)), whole(tokens_of(3, 13)).logits)


def test_a_multi_modal_model_whose_text_model_is_no_model_of_its_own(
    save_tiny_model: Callable[[Any, Any], Path],
) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = QWEN_VISION | {"deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=config_of("qwen3_vl_text", {}).to_dict(), vision_config=vision)
    folder = save_tiny_model(Qwen3VLForConditionalGeneration, config)
    with pytest.raises(UserError, match="multi-modal qwen3_vl, and transformers cannot read its text model by itself"):
        LanguageModel.load(str(folder), dtype="float32", device="cpu")


# --- what the tests share ---------------------------------------------------------------------------------------


def read_by_the_sublayer(model: LanguageModel, plain: Any, site: str, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """What the module of the same name reads in a model that was loaded apart, by a hook of its own."""
    reader = model._points.sublayer_input(site, layer)
    assert reader is not None
    path = next(path for path, module in model._model.named_modules() if module is reader.module)
    seen = []

    def keep(_module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(args[0] if args else options.get("hidden_states", options.get("hidden_state")))

    handle = plain.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        plain(tokens, use_cache=False)
    handle.remove()
    return seen[0].view(*tokens.shape, -1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name: str, save_tiny_model: Callable[[Any, Any], Path]) -> None:
    model_type, settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        LanguageModel.load(str(build(save_tiny_model, model_type, settings)), dtype="float32", device="cpu")


def test_the_table_is_complete() -> None:
    """Whatever class both libraries have is in it, under one of the model types that use it."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text_only = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if "Conditional" not in name}
    both = text_only & set(SUPPORTED_ARCHITECTURES)
    model_types = {case[0] for case in (*CASES.values(), *REFUSED.values())}
    covered = {MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]].__name__ for model_type in model_types}
    assert both - covered == set()
    assert len(both) > 60
