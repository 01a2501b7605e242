"""Which TransformerLens hook gives what a transcoder reads, and back.

Of a block in TransformerLens 3 (checked against the modules of Gemma-2, Llama and GPT-2 in tests/matryoshka):

    blocks.L.hook_resid_mid        r, raw
    blocks.L.ln2.hook_normalized   n: after the division by the norm, before gain and bias
    blocks.L.mlp.hook_in           u: what the MLP reads, after gain and bias; so is ln2.hook_out

and the same with resid_pre, ln1 and attn. TransformerLens 2 has neither mlp.hook_in nor ln2.hook_out, and its
ln2.hook_normalized of a LayerNorm is u, not n; for an RMSNorm it is n in every version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from matryoshka.errors import UserError
from matryoshka.sites import SITES, input_conventions
from matryoshka.transcoder import TranscoderConfig

_NORM_AND_SUBLAYER = {"resid_mid": ("ln2", "mlp"), "resid_pre": ("ln1", "attn")}
_MLP_ITSELF = "mlp.hook_out"
_SUCH_MODELS = """
    ApertusForCausalLM ArceeForCausalLM BambaForCausalLM BitNetForCausalLM CodeGenForCausalLM Cohere2ForCausalLM
    CohereForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM Ernie4_5ForCausalLM
    FalconForCausalLM FalconH1ForCausalLM GemmaForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    GlmForCausalLM GlmMoeDsaForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoForCausalLM
    GPTNeoXForCausalLM GptOssForCausalLM HunYuanDenseV1ForCausalLM Jais2ForCausalLM JambaForCausalLM
    JetMoeForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM
    MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM MixtralForCausalLM
    ModernBertDecoderForCausalLM NanoChatForCausalLM NemotronForCausalLM OlmoeForCausalLM OlmoForCausalLM
    Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
    StableLmForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM YoutuForCausalLM
"""
ADDS_ITS_MLP = frozenset(_SUCH_MODELS.split())
"""Classes of models whose blocks add the output of their module `mlp` as it is; a test holds them to the modules."""
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class InputSite:
    """What a hook means: the site of the residual stream it comes from, and in which form."""

    source_site: str
    convention: str


def split_hook(hook: str) -> tuple[int, str]:
    """(layer, the rest) of `blocks.17.hook_mlp_out`. Raises UserError for any other form."""
    match = _HOOK.fullmatch(hook)
    if match is None:
        raise UserError(f"{hook!r} is not a hook point of a block; expected a name such as blocks.17.hook_resid_mid")
    return int(match[1]), match[2]


def input_hook(config: TranscoderConfig) -> str:
    """The hook whose tensor this transcoder reads as it stands; raises UserError when it does not say its site."""
    layer, _ = split_hook(_known(config, config.source_hook, "source_hook"))
    if config.input not in input_conventions(config.source_site):
        raise UserError(
            f"the transcoder reads {config.source_site} as {config.input!r}, which does not exist; its config.json is "
            "damaged"
        )
    if config.input == config.source_site:
        return config.source_hook
    norm, sublayer = _NORM_AND_SUBLAYER[config.source_site]
    rest = f"{norm}.hook_normalized" if config.input == "normalized" else f"{sublayer}.hook_in"
    return f"blocks.{layer}.{rest}"


def output_hook(config: TranscoderConfig) -> str:
    """The hook whose tensor this transcoder predicts; raises UserError when it does not say."""
    split_hook(_known(config, config.target_hook, "target_hook"))
    return config.target_hook


def check_output_hook(rest: str) -> None:
    """Raise UserError unless the hook `rest` of a block (without `blocks.L.`) is what its MLP gives."""
    if rest not in ("hook_mlp_out", _MLP_ITSELF):
        raise UserError(
            f"{rest} is not the output of an MLP. It may be hook_mlp_out, which is what a block adds to the stream, or "
            f"{_MLP_ITSELF}, which is the same in a block without a norm after its MLP"
        )


def added_hook(hook: str, architecture: str) -> str:
    """The hook of what is added to the stream, where `hook` gives the very same tensor in this class of model.

    `blocks.L.mlp.hook_out` is `blocks.L.hook_mlp_out` unless a norm or a factor follows the MLP (Gemma-2, OLMo-2,
    Granite). Any other hook comes back as it is.
    """
    if hook.endswith(f".{_MLP_ITSELF}") and architecture in ADDS_ITS_MLP:
        return hook.removesuffix(_MLP_ITSELF) + "hook_mlp_out"
    return hook


def _known(config: TranscoderConfig, hook: str, field: str) -> str:
    if not hook:
        raise UserError(
            f"the transcoder of {config.d_sae} latents does not say where it belongs: its config.json has no {field}; "
            "add it, for example blocks.17.hook_resid_mid"
        )
    return hook


def read_input_hook(rest: str, norm_kind: str | None = None) -> InputSite:
    """What the hook `rest` of a block (without `blocks.L.`) gives.

    `norm_kind` is "rms" or "layer" where the model's norm is known. Raises UserError when the hook cannot be derived
    from a stored residual, or means different things in different versions of TransformerLens.
    """
    known = {f"hook_{site}": InputSite(site, site) for site in SITES}
    for site, (norm, sublayer) in _NORM_AND_SUBLAYER.items():
        convention = input_conventions(site)[2]
        known[f"{norm}.hook_normalized"] = InputSite(site, "normalized")
        known[f"{norm}.hook_out"] = InputSite(site, convention)
        known[f"{sublayer}.hook_in"] = InputSite(site, convention)
    if rest not in known:
        more = (
            "; it means the residual in TransformerLens but the MLP's input in some releases, so that it cannot be told"
            if rest == "hook_mlp_in"
            else ""
        )
        raise UserError(f"{rest} cannot be derived from stored rows{more}. What can be is {', '.join(known)}")
    if rest.endswith("hook_normalized") and norm_kind == "layer":
        raise UserError(
            f"{rest} of a LayerNorm is before gain and bias in TransformerLens 3 and after them in 2, "
            'so that it cannot be told. Write "input": "normalized" or "input": "mlp_in" into its metadata'
        )
    return known[rest]
