"""`evaluate absorption` and `evaluate probing` on words whose first letter is planted in the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evaluate.analyses.absorption.absorption import AbsorptionAnalysis, fit_positions
from evaluate.analyses.absorption.letter_task import LetterTask
from evaluate.analyses.absorption.result import AbsorptionResult
from evaluate.analyses.absorption.table import absorption_table
from evaluate.analyses.probing.probing import ProbingAnalysis
from evaluate.analyses.probing.result import ProbingResult
from evaluate.analyses.probing.table import probing_table
from evaluate.analysis import Answer, Silent, answer
from evaluate.cli import app
from evaluate.config import EvaluateConfig
from evaluate.rows.words import is_test_word
from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.tokens import TokenTexts

SETS = ("first_letter", "token_kind", "document_start")


@pytest.fixture(scope="module")
def letters(planted: Any) -> ShardSet:
    return planted.shards


@pytest.fixture(scope="module")
def run(planted: Any, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.run(tmp_path_factory.mktemp("runs") / "planted", planted.transcoder)


def config(letters: ShardSet, **changes: Any) -> EvaluateConfig:
    absorption = {"per_word": 6, "test_share": 0.3, "min_letters": 8, "min_words": 3, "train_tokens": 100_000}
    probing = {"test_share": 0.3, "min_examples": 5, "ks": [1, 3], "sets": list(SETS)}
    settings = {"shards": letters.path, "bootstrap": 50, "device": "cpu", "absorption": absorption, "probing": probing}
    return EvaluateConfig.model_validate({**settings, **changes})


def measure_absorption(
    runs: list[Path], settings: EvaluateConfig, tokenizer: str | None = None
) -> list[Answer[AbsorptionResult]]:
    return answer(AbsorptionAnalysis(tokenizer), runs, settings)


def probe_runs(
    runs: list[Path], settings: EvaluateConfig, labels: Path | None = None, tokenizer: str | None = None
) -> list[Answer[ProbingResult]]:
    return answer(ProbingAnalysis(labels, tokenizer), runs, settings)


def test_planted_absorption_is_found_where_it_is(run: Path, letters: ShardSet, planted: Any) -> None:
    """By hand: of each letter's rows those of `planted.absorbed` are absorbed, and by those words' own latents."""
    (measured,) = measure_absorption([run], config(letters))
    result = measured.result
    assert measured.is_new
    assert [probe.letter for probe in result.probes if probe.passed] == list(planted.letters)
    assert min(probe.f1 or 0 for probe in result.probes if probe.passed) > 0.95
    task = LetterTask(letters, config(letters), TokenTexts.read(result.tokenizer), Silent())
    rows = [task.test.words[word] for word in task.test.word.tolist()]
    assert {is_test_word(word, 0.3, 0) for word in rows} == {True}
    full = result.prefixes[-1]
    assert full.n_letters == 8
    for number, letter in enumerate(full.letters):
        assert letter.main_latents[0] == number
        own = [word for word in rows if word[0] == letter.letter]
        share = sum(word in planted.absorbed for word in own) / len(own)
        assert letter.full_absorption == pytest.approx(share, abs=1e-9)
        assert letter.missed == pytest.approx(share, abs=1e-9)
        assert letter.absorption_fraction == pytest.approx(share, abs=0.02)
        absorbers = {absorber.latent: absorber.words for absorber in letter.absorbers}
        assert absorbers == {8 + i: (word,) for i, word in enumerate(planted.absorbed) if word[0] == letter.letter}
    assert full.full_absorption == pytest.approx(np.mean([letter.full_absorption for letter in full.letters]))
    assert full.full_absorption_interval is not None
    assert full.full_absorption_interval[0] <= (full.full_absorption or 0) <= full.full_absorption_interval[1]
    # The first group alone has the same silent latents, and no other latent predicts them.
    first = result.prefixes[0]
    assert first.prefix_end == 8
    assert first.full_absorption == 0.0
    assert first.missed == pytest.approx(full.missed)


def test_the_same_again_is_only_read_and_gives_the_same_bytes(run: Path, letters: ShardSet) -> None:
    (first,) = measure_absorption([run], config(letters))
    before = first.path.read_bytes()
    (again,) = measure_absorption([run], config(letters))
    assert not again.is_new
    assert again.result == first.result
    first.path.unlink()
    (anew,) = measure_absorption([run], config(letters))
    assert anew.is_new
    assert anew.path.read_bytes() == before
    # Another tokenizer may find other words in the same tokens.
    (read,) = measure_absorption([run], config(letters), str(Path(first.result.tokenizer).resolve()) + "/")
    assert read.is_new
    assert [change.partition(":")[0] for change in read.replaced] == ["settings.tokenizer"]
    measure_absorption([run], config(letters))
    (other,) = measure_absorption([run], config(letters, seed=0, bootstrap=20))
    assert other.replaced == ("settings.bootstrap: 50 -> 20",)


def test_one_prefix_has_a_folder_of_its_own(run: Path, letters: ShardSet) -> None:
    (alone,) = measure_absorption([run], config(letters, prefix=1))
    assert alone.path.parent.name == "prefix-1"
    (whole,) = measure_absorption([run], config(letters))
    assert alone.result.prefixes == whole.result.prefixes[:1]


def test_too_few_letters_are_refused(run: Path, letters: ShardSet) -> None:
    settings = config(letters).model_copy(deep=True)
    strict = settings.absorption.model_copy(update={"min_letters": 9})
    with pytest.raises(UserError, match=r"first letter of 8 letters .* 9 are needed.*min_letters=8"):
        measure_absorption([run], settings.model_copy(update={"absorption": strict, "bootstrap": 7}))


def test_text_without_words_is_refused(made: Any, letters: ShardSet, val_set: ShardSet, run: Path) -> None:
    other = made.run(run.parent / "other", made.transcoder(model=made.facts["model"]))
    settings = config(letters).model_copy(update={"shards": val_set.path})
    tokenizer = run.parent / "numbers"
    tokenizer.mkdir()
    from tokenizers import Tokenizer, models

    vocabulary = {f"{number}": number for number in range(60)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="0")).save(str(tokenizer / "tokenizer.json"))
    with pytest.raises(UserError, match="the first letter of 0 letters"):
        measure_absorption([other], settings, str(tokenizer))
    (probed,) = probe_runs([other], settings, tokenizer=str(tokenizer))
    assert {"first_letter", "token_kind"} <= set(probed.result.skipped)


def test_with_split_train_the_readback_sees_no_scored_row(letters: ShardSet, planted: Any) -> None:
    settings = config(letters, split="train")
    task = LetterTask(letters, settings, TokenTexts.read(str(Path(letters.path).parent / "tokenizer")), Silent())
    context, position = fit_positions(task)
    used = set(zip(context.tolist(), position.tolist(), strict=True))
    scored = set(zip(task.test.context.tolist(), task.test.position.tolist(), strict=True))
    assert scored
    assert not used & scored
    assert len(used) == 70 * (planted.ctx_len - 1) - len(scored)
    assert not set(task.test.word.tolist()) & set(task.train.word.tolist())


def test_probing_finds_the_planted_latents(run: Path, letters: ShardSet, planted: Any) -> None:
    (probed,) = probe_runs([run], config(letters))
    assert probed.is_new
    sets = {label_set.name: label_set for label_set in probed.result.sets}
    assert probed.result.skipped == {"document_start": "fewer than two classes have 5 rows on either side"}
    letter = sets["first_letter"]
    assert [one.label for one in letter.classes] == list(planted.letters)
    assert letter.majority_accuracy == 0.5
    assert letter.source.accuracy > 0.95
    assert [score.k for score in letter.source_top_k] == [1, 3]
    best = {one.label: one for one in letter.prefixes[-1].scores[0].classes}
    assert [best[name].latents for name in planted.letters] == [(number,) for number in range(8)]
    # Of b, whose latent is never silent, one latent says all.
    assert best["b"].accuracy == 1.0
    assert best["a"].accuracy < 1.0
    kinds = sets["token_kind"]
    assert [one.label for one in kinds.classes] == ["digits", "lower-case word", "punctuation"]
    # Punctuation and digits are where no letter is: all they have in common is a small source.
    assert kinds.source.accuracy > 0.6
    (again,) = probe_runs([run], config(letters))
    assert not again.is_new


def test_labels_of_documents(run: Path, letters: ShardSet, tmp_path: Path) -> None:
    """The parity of a document's number is in the last dimension, which no latent reads."""
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"doc_id": doc, "label": doc % 2}) + "\n" for doc in range(110)))
    settings = config(letters)
    only_labels = settings.probing.model_copy(update={"sets": ()})
    settings = settings.model_copy(update={"probing": only_labels})
    (probed,) = probe_runs([run], settings, labels)
    (documents,) = probed.result.sets
    assert (documents.name, documents.unit) == ("labels", "document")
    assert [(one.label, one.n_train, one.n_test) for one in documents.classes] == [("0", 70, 40), ("1", 70, 40)]
    assert documents.source_top_k[0].accuracy == 1.0
    (other,) = probe_runs([run], settings)
    assert any("labels_sha256" in change for change in other.replaced)
    (train,) = probe_runs([run], settings.model_copy(update={"split": "train"}), labels)
    sizes = train.result.sets[0].classes[0]
    assert sizes.n_train + sizes.n_test < 70
    labels.write_text('{"doc_id": 1, "label": "x"}\n{"doc_id": 2, "label": "y"}\n')
    with pytest.raises(UserError, match="2 of its documents are in the train split and 0 in the test"):
        probe_runs([run], settings, labels)


def test_the_commands(run: Path, letters: ShardSet) -> None:
    small = ["min_letters=8", "min_words=3", "test_share=0.3", "per_word=6"]
    options = [word for one in small for word in ("--set", f"evaluate.absorption.{one}")]
    shards = ["--shards", str(letters.path), "--device", "cpu"]
    shown = CliRunner().invoke(app, ["absorption", str(run), *shards, *options], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "first-letter absorption, 8 letters" in shown.output
    shown = CliRunner().invoke(app, ["probing", str(run), *shards, "--set", "evaluate.probing.ks=[1]"])
    assert shown.exit_code == 0, shown.output
    assert "sparse probing" in shown.output
    assert "nothing left to do" in CliRunner().invoke(app, ["absorption", str(run), *shards, *options]).output


def test_the_tables_are_readable(
    run: Path, letters: ShardSet, tmp_path: Path, check_readable: Callable[..., None]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "set").symlink_to(letters.path)
    options = ["--shards", "set", "--tokenizer", str(Path(letters.path).parent / "tokenizer")]
    small = ["min_letters=8", "min_words=3", "test_share=0.3", "per_word=6"]
    commands = [
        ["absorption", "run", *(word for one in small for word in ("--set", f"evaluate.absorption.{one}"))],
        ["probing", "run", "--set", "evaluate.probing.ks=[1, 2, 3, 5, 8, 16]"],
    ]
    check_readable([["evaluate", *words, *options] for words in commands], tmp_path)


def test_the_tables(run: Path, letters: ShardSet) -> None:
    (measured,) = measure_absorption([run], config(letters))
    assert absorption_table(measured.result).row_count == 2 + 8
    doubtful = measured.result.prefixes[-1].model_copy(update={"main_f1": 0.1})
    table = absorption_table(measured.result.model_copy(update={"prefixes": (doubtful,)}))
    assert "hardly any" in str(table.caption)
    assert "hardly any" not in str(absorption_table(measured.result).caption)
    (probed,) = probe_runs([run], config(letters))
    assert probing_table(probed.result).row_count == 3 * len(probed.result.sets)
