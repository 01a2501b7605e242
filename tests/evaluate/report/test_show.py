"""A latent in the terminal: text that is shown and not obeyed."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from evaluate.analyses.samples.files import SamplesMetadata, Window
from evaluate.analyses.samples.samples import SamplesAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.report.show import show_latent, window_line
from evaluate.rows.token_text import visible
from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet


def save_tokenizer(folder: Path) -> Path:
    """Forty words; one looks like markup, one like a terminal command."""
    from tokenizers import Tokenizer, models

    words = {f" w{i}": i for i in range(38)} | {"[red]x[/]": 38, "\x1b[2J": 39}
    folder.mkdir(parents=True)
    Tokenizer(models.WordLevel(words, unk_token=" w0")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(val_set: ShardSet, made: Any, tmp_path: Path) -> Path:
    path = made.run(tmp_path / "run", made.transcoder())
    config = EvaluateConfig(shards=val_set.path, device="cpu")
    answer(SamplesAnalysis(), [path], config)
    return path


def test_a_latent_with_its_text(run: Path, tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    show_latent(run, 3, tokenizer=str(save_tokenizer(tmp_path / "tokenizer")), to=console)
    text = console.export_text()
    for part in ("latent 3", "group 1 of 3", "val rows", "largest activations", "by tenth of the activations", " w7"):
        assert part in text


def test_ids_where_there_is_no_tokenizer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    console = Console(width=100, record=True, file=io.StringIO())
    show_latent(run, 3, to=console)
    assert "token ids are shown" in capsys.readouterr().err
    assert "[7]" in console.export_text()
    with pytest.raises(UserError, match="is not available"):
        show_latent(run, 3, tokenizer=str(tmp_path / "nowhere"), to=console)


def plain(run: Path, tmp_path: Path, **options: Any) -> str:
    """What is printed where there are no colours."""
    console = Console(width=300, file=io.StringIO())
    if not (tmp_path / "tokenizer").exists():
        save_tokenizer(tmp_path / "tokenizer")
    show_latent(run, 3, tokenizer=str(tmp_path / "tokenizer"), to=console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_firing_token_is_marked_without_colours(run: Path, tmp_path: Path) -> None:
    text = plain(run, tmp_path)
    top = text.partition("largest activations\n")[2].partition("\n\n")[0].splitlines()
    random = text.partition("where it does not fire\n")[2].splitlines()
    assert len(top) > 4
    assert [line.count("\u00ab") for line in top] == [1] * len(top)
    assert re.search(r" \u00abw\d+\u00bb", text)  # at the word, not at the space before it
    assert "\u00ab" not in "".join(random)


def test_only_the_largest(run: Path, tmp_path: Path) -> None:
    lines = plain(run, tmp_path, top=2).partition("largest activations\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert plain(run, tmp_path).startswith(plain(run, tmp_path, top=2).rstrip("\n"))


def test_what_other_results_say_of_it(run: Path, made: Any, tmp_path: Path) -> None:
    folder = next(run.glob("eval/*"))
    metadata = SamplesMetadata.read(folder)
    assert metadata is not None
    assert "raises" not in plain(run, tmp_path)
    logits = {"latent": [3, 3, 3, 4], "side": [1, 1, -1, 1], "rank": [0, 1, 0, 0], "token": [7, 5, 38, 1]}
    pq.write_table(pa.table({**logits, "effect": [0.9, 0.5, -0.4, 0.1]}), folder / "logits.parquet")
    edges = {"parent": [1, 2, 0], "child": [3, 3, 4], "p_parent_given_child": [0.25, 0.75, 1.0]}
    edges |= {name: [0.1] * 3 for name in ("p_child_given_parent", "lift", "cosine")}
    pq.write_table(pa.table(edges), folder / "hierarchy.parquet")
    partners = {"latent": [3], "other": [4], "rank": [1], "n_both": [2], "jaccard": [0.5], "phi": [0.5]}
    pq.write_table(pa.table(partners), folder / "cofiring.parquet")
    facts = {"transcoder": metadata.transcoder, "shard_set": metadata.shard_set, "settings": {}}
    results = {name: made.results(facts)[name] for name in ("logits", "hierarchy")}
    for name, result in results.items():
        publish_json(folder / f"{name}.json", result.model_dump(mode="json"))
    text = plain(run, tmp_path)
    assert "raises the logits of  ' w7' (+0.90), ' w5' (+0.50)\n" in text
    assert "run evaluate logits again for the change in logits" in text
    scaled = {"scale": 0.02, "scale_rows": 4099, "soft_cap": 30.0}
    publish_json(folder / "logits.json", results["logits"].model_copy(update=scaled).model_dump(mode="json"))
    text = plain(run, tmp_path)
    assert "raises the logits of  ' w7' +0.018 (+0.90), ' w5' +0.01 (+0.50)\n" in text
    assert "lowers the logits of  '[red]x[/]' -0.008 (-0.40)\n" in text
    assert (
        "per unit of activation before the soft cap at 30, at the median scale of the final norm (0.02, over 4,099"
        in text
    )
    assert "parents               2 (on 75% of its rows), 1 (on 25% of its rows)\n" in text
    # those of other weights are not shown
    other = metadata.transcoder.model_copy(update={"sha256": "0" * 64})
    for name, result in results.items():
        publish_json(folder / f"{name}.json", result.model_copy(update={"transcoder": other}).model_dump(mode="json"))
    assert "raises" not in plain(run, tmp_path)
    assert "parents" not in plain(run, tmp_path)


def test_a_latent_that_is_not_there(run: Path) -> None:
    with pytest.raises(UserError, match="latents 0 to 47, and no latent 48"):
        show_latent(run, 48)


def test_tokens_are_neither_markup_nor_commands() -> None:
    window = Window(0, "top", None, 1, 0, 1, 0, 1, 2.0, [1, 2, 3], [0.0, 2.0, 0.5])
    line = window_line(window, 2.0, {1: "[red]x[/]", 2: "\x1b[2J", 3: "a\n\tb\u202e"}.__getitem__)
    assert line.plain.endswith("[red]x[/]\ufffd[2Ja\u21b5\u21e5b\ufffd")
    assert "\x1b" not in line.plain
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert "bold underline" in styles["\ufffd[2J"]
    assert styles["\ufffd[2J"] != styles["a\u21b5\u21e5b\ufffd"]
    assert visible("\x07 ok") == "\ufffd ok"
