"""A latent in the terminal: text that is shown and not obeyed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaluate.config import EvaluateConfig
from evaluate.samples import make_samples
from evaluate.samples_file import Window
from evaluate.show import show_latent, visible, window_line
from matryoshka.errors import UserError
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
    make_samples(path, config)
    return path


def test_a_latent_with_its_text(run: Path, tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    show_latent(run, 3, tokenizer=str(save_tokenizer(tmp_path / "tokenizer")), console=console)
    text = console.export_text()
    for part in ("latent 3", "group 1 of 3", "val rows", "largest activations", "by tenth of the activations", " w7"):
        assert part in text


def test_ids_where_there_is_no_tokenizer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    console = Console(width=100, record=True, file=io.StringIO())
    show_latent(run, 3, console=console)
    assert "token ids are shown" in capsys.readouterr().err
    assert "[7]" in console.export_text()
    with pytest.raises(UserError, match="cannot be had"):
        show_latent(run, 3, tokenizer=str(tmp_path / "nowhere"), console=console)


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
