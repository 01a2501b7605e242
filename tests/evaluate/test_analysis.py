"""What every analysis promises, whatever it measures: one contract, tested on each row of ANALYSES."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.analyses import ANALYSES, Entry
from evaluate.analyses.logits import effects as logit_effects
from evaluate.analysis import Answer, Silent, answer
from evaluate.cli import app
from evaluate.commands.terminal import Terminal
from evaluate.config import EvaluateConfig
from evaluate.rows import context_blocks
from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

ROOT = Path(__file__).parents[2]
EVERY = [entry.name for entry in ANALYSES]


@dataclass(frozen=True)
class Case:
    """What one analysis is tried on."""

    shards: ShardSet
    transcoder: Transcoder
    settings: dict[str, Any]
    other: dict[str, Any]
    """Settings that give other numbers,"""
    change: str
    """and how the answer names the change."""
    arguments: dict[str, Any] = field(default_factory=dict)
    n_parts: int = 1
    """Results of one run."""


SMALL = {"device": "cpu", "batch_rows": 11, "curve_tokens": 40, "bootstrap": 20, "save_minutes": 0.0}


@pytest.fixture
def case(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The case of the analysis `name`; the language model and the words are made where they are needed alone."""

    def of_model(**more: Any) -> Case:
        one = request.getfixturevalue("subject")("llama")
        settings = {**SMALL, "lm": {"batch_tokens": 2 * 13}}
        return Case(one.shards, one.transcoder, settings, **more)

    if name in ("run", "hierarchy", "samples"):
        # Blocks of about two contexts, so that there are several.
        monkeypatch.setattr(context_blocks, "BLOCK_ROWS", 16)
        return Case(
            request.getfixturevalue("val_set"),
            request.getfixturevalue("made").transcoder(),
            {
                **SMALL,
                "hierarchy": {"clusters": False, "min_rows": 2},
                "samples": {"top": 4, "per_decile": 1, "random": 2, "before": 3, "after": 2},
            },
            other={"tokens": 30},
            change="settings.tokens: null -> 30",
        )
    if name in ("absorption", "probing"):
        words = request.getfixturevalue("planted")
        settings = {
            **SMALL,
            "absorption": {"per_word": 6, "test_share": 0.3, "min_letters": 8, "min_words": 3, "max_words": 200},
            "probing": {"test_share": 0.3, "min_examples": 5, "ks": [1, 3], "sets": ["first_letter", "token_kind"]},
        }
        change = "settings.seed: 0 -> 2"
        return Case(words.shards, words.transcoder, settings, other={"seed": 2}, change=change)
    if name == "faithfulness":
        return of_model(other={"seed": 4}, change="settings.seed: 0 -> 4")
    if name == "ablate":
        # Latent 30 never fires.
        return of_model(other={"seed": 4}, change="settings.seed: 0 -> 4", arguments={"latents": [7, 0, 30]}, n_parts=3)
    assert name == "logits"
    # Tiles of two latents, so that there are several.
    monkeypatch.setattr(logit_effects, "_TILE_BYTES", 2 * 4 * logit_effects._TOKENS_AT_ONCE)
    return of_model(other={"logits": {"top": 3}}, change="settings.top: 10 -> 3")


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Counting(Silent):
    """Counts the reports of progress, and raises at the n-th; keeps what was noted."""

    def __init__(self, n: int = 10**6) -> None:
        self.n_left, self.n_reports, self.n_passes = n, 0, 0
        self.notes: list[str] = []

    def started(self, name: str, n_rows: int) -> None:  # noqa: ARG002
        self.n_passes += 1

    def advanced(self, n_rows: int) -> None:  # noqa: ARG002
        self.n_reports += 1
        if self.n_reports > self.n_left:
            raise Stopped

    def noted(self, text: str) -> None:
        self.notes.append(text)


def _of_sets(counting: Counting) -> list[str]:
    """What was noted of shard sets; an analysis may note more, such as how long it takes."""
    return [text for text in counting.notes if "shard set" in text]


@dataclass(frozen=True)
class Bench:
    """One analysis with its case, and runs to measure."""

    name: str
    case: Case
    folder: Path
    save_run: Callable[..., Path]

    @property
    def entry(self) -> Entry:
        """Its row of the table."""
        (entry,) = (entry for entry in ANALYSES if entry.name == self.name)
        return entry

    def run(self, name: str = "run", *, named: bool = True) -> Path:
        """A run that was trained on the shard set of the case."""
        return self.save_run(self.folder / name, self.case.transcoder, shards=self.case.shards if named else None)

    def config(self, **changes: Any) -> EvaluateConfig:
        """Settings on the shard set of the case."""
        return EvaluateConfig.model_validate({"shards": self.case.shards.path, **self.case.settings, **changes})

    def answer(self, runs: list[Path], progress: Silent | None = None, **changes: Any) -> list[Answer[Any]]:
        """What the command gives."""
        return answer(self.entry.load()(**self.case.arguments), runs, self.config(**changes), progress)


@pytest.fixture
def bench(name: str, case: Case, tmp_path: Path, made: Any) -> Bench:
    """The analysis `name` in an empty folder."""
    return Bench(name, case, tmp_path, made.run)


def test_the_table_is_what_commands_settings_and_documents_know() -> None:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    documented = (ROOT / "docs" / "evaluation.md").read_text()
    for entry in ANALYSES:
        analysis = entry.load()
        assert analysis.name == entry.name
        assert entry.name in commands
        assert f"`{entry.name}" in documented
        assert not set(analysis.shared) - set(EvaluateConfig.model_fields)
        assert entry.name == "run" or entry.name in EvaluateConfig.model_fields
    assert len({entry.name for entry in ANALYSES}) == len(ANALYSES)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", EVERY)
def test_the_same_again_only_reads(bench: Bench) -> None:
    run = bench.run()
    first = bench.answer([run])
    before = files(run / "eval")
    assert len(first) == bench.case.n_parts
    assert all(one.is_new and one.path.is_file() for one in first)
    assert {one.path.relative_to(run / "eval").parts[0] for one in first} == {
        f"{bench.case.shards.name}-{bench.case.shards.digest[:8]}"
    }
    counting = Counting()
    again = bench.answer([run], counting)
    assert (counting.n_passes, counting.n_reports) == (0, 0)
    assert not any(one.is_new for one in again)
    assert [one.result for one in again] == [one.result for one in first]
    assert files(run / "eval") == before
    assert not any(str(bench.folder).encode() in content for content in before.values())


@pytest.mark.parametrize("name", EVERY)
def test_other_settings_replace_and_say_how(bench: Bench) -> None:
    run = bench.run()
    bench.answer([run])
    before = files(run / "eval")
    for one in bench.answer([run], **bench.case.other):
        assert one.is_new
        assert one.replaced == (bench.case.change,)
    assert files(run / "eval") != before
    bench.answer([run])
    assert files(run / "eval") == before


@pytest.mark.parametrize("name", EVERY)
def test_a_result_that_is_broken_or_lacks_a_table_is_made_anew(bench: Bench) -> None:
    run = bench.run()
    first = bench.answer([run])[0]
    before = files(run / "eval")
    for path in [first.path, *(first.path.parent / table for table in first.result.tables())]:
        if path == first.path:
            path.write_bytes(path.read_bytes()[:100])
        else:
            path.unlink()
        assert bench.answer([run])[0].is_new
        assert files(run / "eval") == before


def stops(n_reports: int) -> Iterator[int]:
    """Where to stop: everywhere, or at about eight batches of a long pass."""
    yield from range(1, n_reports, max(1, n_reports // 8))


@pytest.mark.parametrize("name", EVERY)
def test_killed_after_any_batch_it_goes_on_to_the_same_bytes(bench: Bench) -> None:
    whole, counting = bench.run("whole/run"), Counting()
    bench.answer([whole], counting)
    expected = files(whole / "eval")
    assert counting.n_reports > 3
    n_resumed = []
    for n in stops(counting.n_reports):
        run = bench.run(f"{n}/run")
        with pytest.raises(Stopped):
            bench.answer([run], Counting(n))
        again = Counting()
        answers = bench.answer([run], again)
        n_resumed.append(max(one.n_resumed for one in answers))
        assert files(run / "eval") == expected
    assert max(n_resumed) > 0
    if bench.case.n_parts == 1:
        # The later it was killed, the more was done.
        assert n_resumed == sorted(n_resumed)


@pytest.mark.parametrize("name", ["run", "hierarchy"])
def test_memory_that_ends_is_told_with_the_run_and_what_helps(bench: Bench) -> None:
    class Full(Silent):
        def advanced(self, n_rows: int) -> None:  # noqa: ARG002
            raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation")

    with pytest.raises(UserError) as error:
        bench.answer([bench.run()], Full())
    assert str(error.value) == (
        f"the memory of the device is not enough for `evaluate {bench.name}` of run (CUDA out of memory.). With "
        "--device cpu the same command continues after what was saved"
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_fleet_is_its_members(bench: Bench) -> None:
    members = [bench.run(f"fleet/{name}") for name in ("b", "a")]
    publish_json(bench.folder / "fleet" / "fleet.json", {"format_version": 1, "members": ["b", "a"]})
    answers = bench.answer([bench.folder / "fleet"])
    assert [one.checkpoint.run for one in answers[:: bench.case.n_parts]] == members
    alone = bench.run("alone/a")
    bench.answer([alone])
    assert files(alone / "eval") == files(members[1] / "eval")


@pytest.mark.parametrize("name", EVERY)
def test_two_runs_into_one_folder_are_refused(bench: Bench) -> None:
    runs, out = [bench.run("a/run"), bench.run("b/run"), bench.run("other")], bench.folder / "out"
    with pytest.raises(UserError, match="same name"):
        bench.answer(runs[:2], out=out)
    assert not out.exists()
    bench.answer(runs[1:], out=out)
    assert sorted(path.name for path in out.iterdir()) == ["other", "run"]
    one, two = out / "one", bench.run("two")
    bench.answer(runs[:1], out=one)
    before = files(one)
    # Of the same weights it is the same answer; of others it would be overwritten.
    (weights,) = two.glob("checkpoints/step-000400")
    shutil.rmtree(weights)
    with pytest.raises(UserError, match="is of the run run, and two would overwrite it; choose another"):
        bench.answer([two], out=one)
    assert files(one) == before


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_is_not_trained_to_its_end_is_said(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = bench.entry.load()(**bench.case.arguments)
    Terminal().say(analysis, bench.answer([bench.run("done")]))
    assert "not trained to its end" not in capsys.readouterr().err
    early = bench.save_run(bench.folder / "early", bench.case.transcoder, finished=False)
    Terminal().say(analysis, bench.answer([early]))
    assert capsys.readouterr().err.count("early is not trained to its end: this is step 400") == 1


@pytest.mark.parametrize("name", EVERY)
def test_train_rows_and_prefixes_have_folders_of_their_own(bench: Bench) -> None:
    run = bench.run()
    first = [one.path for one in bench.answer([run])]
    top = run / "eval" / f"{bench.case.shards.name}-{bench.case.shards.digest[:8]}"
    before = files(top)
    heeded = bench.entry.load().apart
    folders = {"split": "train", "prefix": "prefix-2"}
    for asked in ({"split": "train"}, {"prefix": 2}, {"split": "train", "prefix": 2}):
        inside = top.joinpath(*(folders[name] for name in asked if name in heeded))
        # What it does not heed is no other question.
        is_new = not (inside / first[0].relative_to(top)).exists()
        found = bench.answer([run], **asked)
        assert [one.path for one in found] == [inside / path.relative_to(top) for path in first]
        assert all(one.is_new == is_new for one in found)
    assert {name: content for name, content in files(top).items() if name in before} == before


@pytest.mark.parametrize("name", EVERY)
def test_the_shard_set_is_known_from_the_run(bench: Bench) -> None:
    run, counting = bench.run(), Counting()
    found = bench.answer([run], counting, shards=None)
    path = bench.case.shards.path
    assert _of_sets(counting) == [f"run: on {path}, the shard set that it was trained on"]
    assert all(one.is_new for one in found)
    named = Counting()
    assert not any(one.is_new for one in bench.answer([run], named))
    assert _of_sets(named) == []
    # The weights alone, by their folder, are of the same run.
    step = bench.answer([run / "checkpoints" / "step-000400"], counting, shards=None)
    assert step[0].result.shard_set == found[0].result.shard_set
    with pytest.raises(UserError, match=r"no shard set was named, and .*bare has no run\.json that names one"):
        bench.answer([bench.run("bare", named=False)], shards=None)
