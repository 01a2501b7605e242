"""Feature data in the JSON of SAEDashboard, which Neuronpedia imports, from the samples of `evaluate samples`.

    <folder>/batch-N.json           LATENTS_PER_BATCH latents each: examples, histogram, decoder alignment
    <folder>/skipped_indexes.json   latents without an example
    <folder>/run_settings.json      where it comes from

No language model is run. The logit lens (pos_str, neg_str) is filled in where `evaluate logits` has made it; the
histogram of all logits and the correlations are left empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.hook_names import input_hook, split_hook
from matryoshka.interop.inputs import ExportInputs, lost_prefixes
from matryoshka.interop.logit_effects import Effects, LogitEffects
from matryoshka.interop.weight_files import write_json
from matryoshka.transcoder import TranscoderConfig

LATENTS_PER_BATCH = 128

_N_ALIGNED = 3
_TOP = -1
"""SAEDashboard's bin_min and bin_contains of the largest activations."""


def place(inputs: ExportInputs) -> str:
    """Name of the folder as SAEDashboard makes it: {model}_{set}_{hook}_{d_sae}."""
    config, run = inputs.transcoder.config, inputs.provenance.run
    parts = (PurePath(config.model).name or "model", run or "matryoshka", input_hook(config), str(config.d_sae))
    return "_".join(re.sub(r"[^\w.-]", "-", part) for part in parts)


def dropped(config: TranscoderConfig) -> list[str]:
    """Weights and prefixes."""
    return ["the weights: the format holds activations of latents", *lost_prefixes(config)]


def write(inputs: ExportInputs, folder: Path) -> None:
    """Write all batches."""
    transcoder, provenance, samples = inputs.transcoder, inputs.provenance, inputs.samples
    if samples is None:
        raise UserError("Neuronpedia's data is made from samples; run `evaluate samples RUN` first")
    config, text_of = transcoder.config, samples.token_texts().text
    histograms = samples.histograms()
    head = {
        "model_id": PurePath(config.model).name,
        "layer": split_hook(input_hook(config))[0],
        "sae_set": provenance.run or "matryoshka",
        "sae_id_suffix": None,
    }
    shared = {
        "n_prompts_total": samples.n_rows // provenance.ctx_len if provenance.ctx_len else samples.n_rows,
        "n_tokens_in_prompt": provenance.ctx_len or 0,
        "dataset": provenance.dataset or "",
    }
    seen: set[int] = set()
    batch: list[dict[str, Any]] = []
    number = 0
    for latent, windows in samples.windows():
        if latent >= config.d_sae:
            break
        while latent // LATENTS_PER_BATCH > number:
            number, batch = _flush(folder, head, number, batch)
        chosen = [window for window in windows if window["kind"] != "random"]
        if not chosen:
            continue
        seen.add(latent)
        own = {
            "feature_index": latent,
            **_alignment(transcoder.W_dec[latent]),
            **_logit_lens(latent, samples.logits, text_of),
            **_histogram(histograms[latent], samples.n_rows),
            **shared,
            "activations": [_example(window, chosen, text_of) for window in chosen],
        }
        batch.append(own)
    _flush(folder, head, number, batch)
    skipped = [latent for latent in range(config.d_sae) if latent not in seen]
    write_json(folder / "skipped_indexes.json", {**head, "skipped_indexes": skipped})
    write_json(
        folder / "run_settings.json",
        {**head, **shared, "n_features": config.d_sae, "n_features_at_a_time": LATENTS_PER_BATCH},
    )


def _flush(
    folder: Path, head: dict[str, Any], number: int, batch: list[dict[str, Any]]
) -> tuple[int, list[dict[str, Any]]]:
    write_json(folder / f"batch-{number}.json", {**head, "features": batch})
    return number + 1, []


def _alignment(direction: Tensor) -> dict[str, Any]:
    """The output dimensions that the latent writes to most."""
    values, indices = direction.float().topk(min(_N_ALIGNED, len(direction)))
    total = float(direction.float().abs().sum()) or 1.0
    return {
        "neuron_alignment_indices": indices.tolist(),
        "neuron_alignment_values": _rounded(values.tolist()),
        "neuron_alignment_l1": _rounded([value / total for value in values.tolist()]),
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": [],
        "correlated_features_pearson": [],
        "correlated_features_l1": [],
        "logits_hist_data_bar_values": [],
        "logits_hist_data_bar_heights": [],
        "decoder_weights_dist": [],
    }


def _logit_lens(latent: int, logits: LogitEffects | None, text_of: Callable[[int], str]) -> dict[str, Any]:
    def side(name: str, effects: Effects) -> dict[str, Any]:
        return {
            f"{name}_str": [text_of(token) for token, _ in effects],
            f"{name}_values": _rounded([effect for _, effect in effects]),
        }

    if logits is None:
        return {**side("neg", []), **side("pos", [])}
    return {**side("neg", logits.lowered.get(latent, [])), **side("pos", logits.raised.get(latent, []))}


def _histogram(histogram: dict[str, Any], n_rows: int) -> dict[str, Any]:
    """Bars at the middle of the bins, up to the last one in use."""
    counts, width = histogram["counts"], histogram["width"]
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    return {
        "frac_nonzero": sum(counts) / n_rows if n_rows else 0.0,
        "freq_hist_data_bar_values": _rounded([(i + 0.5) * width for i in range(last + 1)]),
        "freq_hist_data_bar_heights": counts[: last + 1],
    }


def _example(window: dict[str, Any], windows: list[dict[str, Any]], text_of: Callable[[int], str]) -> dict[str, Any]:
    """One window; the bin of a decile is the range of the activations that its own windows show."""
    if window["kind"] == "top":
        low, high, share = _TOP, window["act"], _TOP
    else:
        acts = [other["act"] for other in windows if other["decile"] == window["decile"]]
        low, high, share = min(acts), max(acts), 0.1
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": [text_of(token) for token in window["tokens"]],
        "values": _rounded(window["acts"]),
        "qualifying_token_index": window["peak"],
    }


def _rounded(values: list[float]) -> list[float]:
    """As SAEDashboard does, to three decimals and no more than the reader sees."""
    return [round(value, 3) for value in values]
