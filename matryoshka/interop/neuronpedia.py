"""Feature data in the JSON of SAEDashboard, which Neuronpedia imports, from the samples of `evaluate samples`.

    <folder>/batch-N.json           LATENTS_PER_BATCH latents each: examples, histogram, decoder alignment
    <folder>/skipped_indexes.json   latents without an example
    <folder>/run_settings.json      where it comes from

No language model is run. The logit lens (pos_str, neg_str) is filled in where `evaluate logits` has made it; the
histogram of all logits and the correlations are left empty.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from matryoshka.config import digest
from matryoshka.errors import UserError
from matryoshka.hook_names import input_hook, split_hook
from matryoshka.interop.logit_effects import MARK_FILE as LOGITS_MARK
from matryoshka.interop.logit_effects import Effects, LogitEffects
from matryoshka.interop.origin import Origin
from matryoshka.interop.weight_files import read_json_object, write_json
from matryoshka.tokens import TokenTexts
from matryoshka.transcoder import Transcoder

MARK_FILE, WINDOWS_FILE, HISTOGRAMS_FILE = "samples.json", "samples.parquet", "histograms.parquet"
LATENTS_PER_BATCH = 128

_FORMAT_VERSION = 1
_N_ALIGNED = 3
_TOP = -1
"""SAEDashboard's bin_min and bin_contains of the largest activations."""


@dataclass(frozen=True, slots=True)
class Samples:
    """A folder samples/ that `evaluate samples` made."""

    folder: Path
    weights_sha256: str
    """Of the transcoder.safetensors that the samples are of."""
    tokenizer: str
    model_revision: str | None
    n_rows: int
    """Rows the examples are chosen from."""
    digest: str
    """Of the marks, which say what decides every byte of the samples and of the logit effects."""
    logits: LogitEffects | None = None
    """Of the same weights, where they were made."""

    @classmethod
    def open(cls, folder: Path) -> Samples:
        """Raises UserError when it is not there whole, or is of another version."""
        if not (folder / MARK_FILE).is_file():
            raise UserError(f"{folder} holds no samples; make them with: evaluate samples RUN")
        mark = read_json_object(folder / MARK_FILE)
        if mark.get("format_version") != _FORMAT_VERSION:
            raise UserError(f"{folder} has format_version {mark.get('format_version')!r}; this version reads 1")
        sha256 = mark["transcoder"]["sha256"]
        logits = LogitEffects.open(folder.parent, sha256)
        marks = mark if logits is None else {**mark, "logits": read_json_object(folder.parent / LOGITS_MARK)}
        return cls(
            folder,
            sha256,
            mark["tokenizer"],
            mark["shard_set"]["model_revision"],
            mark["n_rows"],
            digest(marks),
            logits,
        )

    def token_texts(self) -> TokenTexts:
        """The vocabulary; raises UserError when it cannot be had."""
        return TokenTexts.read(self.tokenizer, revision=self.model_revision, near=self.folder)

    def windows(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(latent, its windows) in rising order of the latents that have some."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.folder / WINDOWS_FILE)
        rows = (row for group in range(file.num_row_groups) for row in file.read_row_group(group).to_pylist())
        for latent, own in itertools.groupby(rows, key=lambda row: row["latent"]):
            yield latent, list(own)

    def histograms(self) -> list[dict[str, Any]]:
        """n_rows, width and counts of each latent."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / HISTOGRAMS_FILE).to_pylist()


def place(transcoder: Transcoder, origin: Origin) -> str:
    """Name of the folder as SAEDashboard makes it: {model}_{set}_{hook}_{d_sae}."""
    config = transcoder.config
    parts = (PurePath(config.model).name or "model", origin.run or "matryoshka", input_hook(config), str(config.d_sae))
    return "_".join(re.sub(r"[^\w.-]", "-", part) for part in parts)


def write(
    transcoder: Transcoder, folder: Path, origin: Origin, samples: Samples, text_of: Callable[[int], str]
) -> None:
    """Write all batches; `text_of` gives the text of a token id."""
    config = transcoder.config
    histograms = samples.histograms()
    head = {
        "model_id": PurePath(config.model).name,
        "layer": split_hook(input_hook(config))[0],
        "sae_set": origin.run or "matryoshka",
        "sae_id_suffix": None,
    }
    shared = {
        "n_prompts_total": samples.n_rows // origin.ctx_len if origin.ctx_len else samples.n_rows,
        "n_tokens_in_prompt": origin.ctx_len or 0,
        "dataset": origin.dataset or "",
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
