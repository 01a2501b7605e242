"""The README.md of an exported folder, in the form of a Hugging Face model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from matryoshka.hook_names import input_hook
from matryoshka.interop.provenance import Provenance
from matryoshka.run_facts import NOT_RECORDED
from matryoshka.transcoder import Transcoder

_SAID = ("input convention", "dataset")
"""Facts of the run that the card has from elsewhere."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

_LIBRARY = {
    "saelens": "saelens",
    "gemma-scope": "saelens",
    "gemma-scope-2": "saelens",
    "circuit-tracer": "circuit-tracer",
    "delphi": "matryoshka-transcoders",
    "neuronpedia": "matryoshka-transcoders",
    "native": "matryoshka-transcoders",
}

_LOAD = {
    "saelens": """from sae_lens import SAE

transcoder = SAE.load_from_disk("{place}")      # or SAE.from_pretrained("user/repo", "folder")
acts = transcoder.encode(x)
y_hat = transcoder(x)""",
    "gemma-scope": """import numpy as np

w = np.load("{place}/params.npz")
pre_acts = x @ w["W_enc"] + w["b_enc"]
y_hat = np.where(pre_acts > w["threshold"], pre_acts, 0).clip(0) @ w["W_dec"] + w["b_dec"]""",
    "gemma-scope-2": """from safetensors.torch import load_file

w = load_file("{place}/params.safetensors")
pre_acts = x @ w["w_enc"] + w["b_enc"]
y_hat = (pre_acts.relu() * (pre_acts > w["threshold"])) @ w["w_dec"] + w["b_dec"]  # + x @ w["affine_skip_connection"]
""",
    "circuit-tracer": """from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

transcoders, config = load_transcoder_from_hub("user/repo")""",
    "delphi": """from delphi.latents import LatentDataset

dataset = LatentDataset("user/repo", sampler_cfg, constructor_cfg)  # the folder that holds {place}/""",
    "neuronpedia": """import json

batch = json.load(open("{place}/batch-0.json"))
print(batch["features"][0]["activations"][0]["tokens"])""",
    "native": """from matryoshka import Transcoder

transcoder = Transcoder.load("{place}")
y_hat = transcoder(x, n_groups=1)""",
}


def model_card(transcoders: Sequence[Transcoder], form: str, place: str, provenance: Provenance) -> str:
    """Text of the card for transcoders that share everything but the layer; `place` is the folder of the weights."""
    config = transcoders[0].config
    # A path of somebody's machine is neither a base model nor anybody's business.
    on_hub = _HUB_NAME.fullmatch(config.model) is not None
    name = config.model if on_hub else PurePath(config.model).name or "an unnamed model"
    ends = ", ".join(f"{end:,}" for end in config.prefix_ends)
    step = "" if provenance.step is None else f", step {provenance.step}"
    run = None if provenance.run is None else provenance.run + step
    facts = [
        ("model", name + (f" at {config.model_revision}" if config.model_revision else "")),
        ("reads", "; ".join(f"`{input_hook(transcoder.config)}`" for transcoder in transcoders)),
        ("predicts", "; ".join(f"`{transcoder.config.target_hook}`" for transcoder in transcoders)),
        ("input convention", f"`{config.input}`, derived from `{config.source_site}`"),
        ("widths", f"{config.d_in:,} -> {config.d_sae:,} latents -> {config.d_out:,}"),
        (
            "nested prefixes",
            f"the first {ends} latents are complete transcoders" if len(config.prefix_ends) > 1 else "none",
        ),
        (
            "active latents in a row",
            None if config.k is None else f"{config.k} on average, as trained at full width",
        ),
        ("skip connection", "yes" if config.skip else "no"),
        ("text", provenance.dataset or provenance.used.dataset),
        ("context", None if provenance.ctx_len is None else f"{provenance.ctx_len:,} tokens"),
        *((what, value) for what, value in provenance.used.lines() if value != NOT_RECORDED and what not in _SAID),
        ("run", run),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts if value)
    return "\n".join(
        [
            "---",
            f"library_name: {_LIBRARY[form]}",
            *([f"base_model: {config.model}"] if on_hub else []),
            "tags: [transcoder, matryoshka, sparse-autoencoder, interpretability]",
            "---",
            "",
            f"# Matryoshka transcoder of {name}",
            "",
            "A transcoder predicts what the MLP adds to the residual stream from what it reads, through sparse latents."
            if config.target_hook.endswith("mlp_out")
            else "A transcoder predicts one activation of a model from another, through sparse latents.",
            "",
            "| | |",
            "|---|---|",
            table,
            "",
            "```",
            "pre_acts = x @ W_enc + b_enc                      b_dec is not subtracted from x",
            "acts     = relu(pre_acts) where pre_acts > threshold, else 0",
            f"y_hat    = acts @ W_dec + b_dec{' + x @ W_skip' if config.skip else ''}",
            "```",
            "",
            "x is the tensor of the hook as it stands: scales and means of the training are folded into the weights.",
            "Take the activations without weight processing (no `fold_ln`, no centring), and leave BOS out.",
            *_caveats(form, config.input, provenance),
            "",
            "```python",
            _LOAD[form].format(place=place).rstrip(),
            "```",
            "",
        ]
    )


def _caveats(form: str, convention: str, provenance: Provenance) -> list[str]:
    lines = []
    if provenance.norm_kind == "layer" and convention == "normalized":
        lines.append(
            "The hook names are those of TransformerLens 3: in version 2 `hook_normalized` of a LayerNorm is after "
            "gain and bias, which is not what this transcoder reads."
        )
    if convention.endswith("_in"):
        lines.append("`hook_in` of a sublayer exists in TransformerLens 3 (TransformerBridge), not in version 2.")
    if form == "circuit-tracer":
        lines.append("Layers without a transcoder hold zeros: circuit-tracer shows their MLPs as error nodes.")
    return ["", *lines] if lines else []
