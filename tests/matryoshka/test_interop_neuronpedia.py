"""SAEDashboard's JSON from a folder of samples made by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matryoshka.errors import UserError
from matryoshka.interop import neuronpedia
from matryoshka.interop.export import export
from matryoshka.interop.provenance import Provenance
from matryoshka.interop.samples import Samples
from matryoshka.transcoder import Transcoder

PROVENANCE = Provenance(run="l3-k4", ctx_len=10, dataset="pile")
PLACE = "gemma-2-2b_l3-k4_blocks.3.ln2.hook_normalized_16"

Make = Callable[..., Transcoder]


def window(latent: int, kind: str, act: float, decile: int | None = None) -> dict[str, Any]:
    acts = [0.0, 0.25, act, 0.0]
    return {
        "latent": latent,
        "kind": kind,
        "decile": decile,
        "act": act,
        "peak": 2,
        "tokens": [7, 8, 9, 7],
        "acts": acts,
    }


WINDOWS = [
    window(1, "top", 5.0),
    window(1, "decile", 3.0, 9),
    window(1, "decile", 2.5, 9),
    window(1, "decile", 0.5, 1),
    window(1, "random", 0.0),
    window(4, "random", 0.0),
    window(9, "top", 1.23456),
]


@pytest.fixture
def samples(tmp_path: Path, tiny_llama: Path) -> Samples:
    folder = tmp_path / "samples"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(WINDOWS), folder / "samples.parquet", row_group_size=3)
    counts = [[0, 0, 0, 0] for _ in range(16)]
    counts[1] = [6, 0, 2, 0]
    counts[9] = [1, 0, 0, 0]
    table = {"n_rows": [sum(row) for row in counts], "width": [2.0] * 16, "counts": counts}
    pq.write_table(pa.table(table), folder / "histograms.parquet")
    mark = {
        "format_version": 1,
        "transcoder": {"sha256": "abc"},
        "shard_set": {"model_revision": None},
        "tokenizer": str(tiny_llama),
        "n_rows": 80,
    }
    (folder / "samples.json").write_text(json.dumps(mark))
    return Samples.open(folder)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / PLACE / name).read_text())


def test_features(make_transcoder: Make, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia, "LATENTS_PER_BATCH", 4)
    transcoder = make_transcoder()
    export([transcoder], "neuronpedia", tmp_path / "out", PROVENANCE, samples=samples)
    batches = [read(tmp_path / "out", f"batch-{i}.json") for i in range(3)]
    assert [[f["feature_index"] for f in batch["features"]] for batch in batches] == [[1], [], [9]]
    head = {"model_id": "gemma-2-2b", "layer": 3, "sae_set": "l3-k4", "sae_id_suffix": None}
    assert all(head.items() <= batch.items() for batch in batches)
    feature = batches[0]["features"][0]
    assert feature["frac_nonzero"] == 8 / 80
    assert feature["freq_hist_data_bar_values"] == [1.0, 3.0, 5.0]
    assert feature["freq_hist_data_bar_heights"] == [6, 0, 2]
    assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"], feature["dataset"]) == (8, 10, "pile")
    row = transcoder.W_dec[1].tolist()
    largest = sorted(range(10), key=lambda i: -row[i])[:3]
    assert feature["neuron_alignment_indices"] == largest
    assert feature["neuron_alignment_values"] == [round(row[i], 3) for i in largest]
    total = sum(abs(value) for value in row)
    assert feature["neuron_alignment_l1"] == pytest.approx([row[i] / total for i in largest], abs=1e-3)
    bins = [(a["bin_min"], a["bin_max"], a["bin_contains"]) for a in feature["activations"]]
    assert bins == [(-1, 5.0, -1), (2.5, 3.0, 0.1), (2.5, 3.0, 0.1), (0.5, 0.5, 0.1)]
    assert feature["activations"][0]["tokens"] == ["w3", "w4", "w5", "w3"]  # four special tokens come first
    assert feature["activations"][0]["values"] == [0.0, 0.25, 5.0, 0.0]
    assert feature["activations"][0]["qualifying_token_index"] == 2
    assert batches[2]["features"][0]["activations"][0]["values"][2] == 1.235
    skipped = read(tmp_path / "out", "skipped_indexes.json")["skipped_indexes"]
    assert skipped == [latent for latent in range(16) if latent not in (1, 9)]


def test_another_tokenizer_writes_the_texts(
    make_transcoder: Make, samples: Samples, tmp_path: Path, tiny_gpt2: Path
) -> None:
    """For the machine where the one that the samples name is not there; an export with it is another export."""
    transcoder = make_transcoder()
    gone = dataclasses.replace(samples, tokenizer="/gone")
    with pytest.raises(UserError, match="Name it with --tokenizer"):
        export([transcoder], "neuronpedia", tmp_path / "out", PROVENANCE, samples=gone)
    here = gone.with_tokenizer(str(tiny_gpt2))
    export([transcoder], "neuronpedia", tmp_path / "out", PROVENANCE, samples=here)
    feature = read(tmp_path / "out", "batch-0.json")["features"][0]
    assert feature["activations"][0]["tokens"] == ["w6", "w7", "w8", "w6"]  # one special token comes first
    assert export([transcoder], "neuronpedia", tmp_path / "out", PROVENANCE, samples=here).already_there
    with pytest.raises(UserError, match="samples"):
        export([transcoder], "neuronpedia", tmp_path / "out", PROVENANCE, samples=samples)


def test_a_prefix_has_only_its_latents(make_transcoder: Make, samples: Samples, tmp_path: Path) -> None:
    export([make_transcoder().prefix(1)], "neuronpedia", tmp_path / "out", PROVENANCE, samples=samples)
    place = tmp_path / "out" / PLACE.replace("_16", "_5")
    assert [f["feature_index"] for f in json.loads((place / "batch-0.json").read_text())["features"]] == [1]
    assert json.loads((place / "skipped_indexes.json").read_text())["skipped_indexes"] == [0, 2, 3, 4]


def test_without_samples_it_says_how_to_make_them(make_transcoder: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluate samples RUN"):
        export([make_transcoder()], "neuronpedia", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="holds no samples"):
        Samples.open(tmp_path)
    (tmp_path / "samples.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="format_version 2"):
        Samples.open(tmp_path)


def test_the_logit_lens_is_what_evaluate_logits_left(make_transcoder: Make, samples: Samples, tmp_path: Path) -> None:
    effects = {"latent": [1, 1, 9, 1], "side": [1, 1, 1, -1], "rank": [1, 0, 0, 0], "token": [8, 7, 9, 10]}
    pq.write_table(pa.table({**effects, "effect": [0.5, 1.25, 2.0, -0.75]}), tmp_path / "logits.parquet")
    (tmp_path / "logits.json").write_text(json.dumps({"transcoder": {"sha256": "abc"}}))
    found = Samples.open(samples.folder)
    assert found.digest != samples.digest  # an export without them is not taken for one with them
    export([make_transcoder()], "neuronpedia", tmp_path / "out", PROVENANCE, samples=found)
    (first, last) = read(tmp_path / "out", "batch-0.json")["features"]
    assert (first["pos_str"], first["pos_values"]) == (["w3", "w4"], [1.25, 0.5])
    assert (first["neg_str"], first["neg_values"]) == (["w6"], [-0.75])
    assert (last["pos_values"], last["neg_values"]) == ([2.0], [])


def test_logit_effects_of_other_weights_are_left_out(samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "logits.json").write_text(json.dumps({"transcoder": {"sha256": "other"}}))
    assert Samples.open(samples.folder).logits is None
    (tmp_path / "logits.json").write_text(json.dumps({"transcoder": {"sha256": "abc"}}))
    with pytest.raises(UserError, match="evaluate logits"):
        Samples.open(samples.folder)
