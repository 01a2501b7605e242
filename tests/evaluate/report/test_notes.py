"""Own notes and stars: what is kept, and that nobody loses any."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evaluate.report.notes import MAX_TEXT, NewNote, Note, NoteChanged, Notes
from matryoshka.errors import UserError

ROOT = Path(__file__).parents[3]
D_SAE = 48


def new(latent: int, text: str, changes: int = 0, *, star: bool = False) -> NewNote:
    return NewNote(latent=latent, star=star, text=text, changes=changes)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    notes = Notes(tmp_path, D_SAE)
    assert notes.read() == {}
    assert notes.keep(new(17, "fires on <b>words</b>\n\u2028", star=True)) == Note(
        star=True, text="fires on <b>words</b>\n\u2028", changes=1
    )
    notes.keep(new(3, "x" * MAX_TEXT))
    notes.keep(new(17, "fires on words", 1))
    # of a run that had more latents
    content = json.loads((tmp_path / "notes.json").read_text())
    assert content["format_version"] == 1
    content["latents"]["48"] = {"star": True, "text": "", "changes": 1}
    (tmp_path / "notes.json").write_text(json.dumps(content))
    again = Notes(tmp_path, D_SAE)
    assert again.read() == {3: Note(text="x" * MAX_TEXT, changes=1), 17: Note(text="fires on words", changes=2)}
    again.keep(new(3, "", 1))
    # A note that says nothing any more still counts its changes, and is not shown.
    assert again.read()[3] == Note(changes=2)
    assert again.shown() == {"17": {"star": False, "text": "fires on words", "changes": 2}}
    assert "48" in json.loads((tmp_path / "notes.json").read_text())["latents"]


def test_a_note_that_was_changed_meanwhile_is_not_lost(tmp_path: Path) -> None:
    one, other = Notes(tmp_path, D_SAE), Notes(tmp_path, D_SAE)
    one.keep(new(5, "first"))
    with pytest.raises(NoteChanged) as changed:
        other.keep(new(5, "second"))
    assert changed.value.note == Note(text="first", changes=1)
    # Of other latents there is nothing to compare.
    other.keep(new(6, "second"))
    other.keep(new(5, "both", 1))
    assert one.read() == {5: Note(text="both", changes=2), 6: Note(text="second", changes=1)}


def _keep_many(run: Path, first: int) -> None:
    for latent in range(first, D_SAE, 3):
        Notes(run, D_SAE).keep(new(latent, f"of {first}"))


def test_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_keep_many, args=(tmp_path, first)) for first in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {latent: note.text for latent, note in Notes(tmp_path, D_SAE).read().items()} == {
        latent: f"of {latent % 3}" for latent in range(D_SAE)
    }


def test_it_survives_a_kill(tmp_path: Path) -> None:
    """Killed while it writes one note after another: all that were kept are there, and the next one can be."""
    code = (
        "import sys; from pathlib import Path; from evaluate.report.notes import NewNote, Notes\n"
        "notes = Notes(Path(sys.argv[1]), 10**6)\n"
        "for i in range(10**6):\n"
        "    notes.keep(NewNote(latent=i, star=False, text='x' * 999, changes=0)); print(i, flush=True)\n"
    )
    kept = -1
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        for _ in range(25):
            kept = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        kept = max([kept, *map(int, process.stdout.read().split())])
    found = Notes(tmp_path, 10**6).read()
    assert kept + 1 <= len(found) <= kept + 2
    Notes(tmp_path, 10**6).keep(new(10**6 - 1, "after"))
    assert len(Notes(tmp_path, 10**6).read()) == len(found) + 1


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"format_version": 2, "latents": {}}',
        '{"format_version": 1, "latents": {"-1": {}}}',
        '{"format_version": 1, "latents": {"1": {"text": 5}}}',
        '{"format_version": 1, "latents": {"1": {"html": "x"}}}',
        json.dumps({"format_version": 1, "latents": {"1": {"text": "x" * (MAX_TEXT + 1)}}}),
    ],
)
def test_a_file_that_is_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(content)
    with pytest.raises(UserError, match=r"notes\.json cannot be read as notes .*; correct it or move it away"):
        Notes(tmp_path, D_SAE).read()
    with pytest.raises(UserError, match="cannot be read as notes"):
        Notes(tmp_path, D_SAE).keep(new(1, "x"))
    assert (tmp_path / "notes.json").read_text() == content


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="latents 0 to 47, and no latent 48"):
        Notes(tmp_path, D_SAE).keep(new(48, "x"))
    with pytest.raises(UserError, match="notes cannot be kept in"):
        Notes(tmp_path / "gone", D_SAE).keep(new(4, "x"))
    assert not list(tmp_path.iterdir())
