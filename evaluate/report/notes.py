"""notes.json of a run: a person's own notes and stars on its latents, which the pages of `evaluate serve` keep.

Beside the checkpoints, not among results: no command makes it anew. Several tabs, and several servers, may change it at
once. Each note counts its changes, and who changes one says which state of it was seen: a state that is gone is
refused, so that nobody loses what somebody else wrote. The file is replaced whole, under a lock.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from matryoshka.config import Config
from matryoshka.errors import UserError
from matryoshka.runs import publish_json

from ..subject.latents import check_latents

NOTES_FILE = "notes.json"
MAX_TEXT = 4000
"""Characters of one note."""
_LOCK_FILE = ".notes.lock"
_MAX_BYTES = 64 * 2**20

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Changes = Annotated[int, Field(ge=0, strict=True)]
Latent = Annotated[int, Field(ge=0)]


class Note(Config):
    """A user's note on one latent."""

    star: bool = False
    text: Text = ""
    changes: Changes = 0
    """How often it was changed; 0 before there is one."""


class NotesFile(Config):
    """The content of notes.json."""

    format_version: Literal[1] = 1
    latents: dict[Latent, Note] = Field(default_factory=dict)


class NewNote(Config):
    """What a page asks to be kept."""

    latent: Annotated[int, Field(ge=0, strict=True)]
    star: Annotated[bool, Field(strict=True)]
    text: Text
    changes: Changes
    """Those of the note that the page showed."""


class NoteChanged(Exception):
    """It was changed since the page showed it; `note` is what it is now."""

    def __init__(self, note: Note) -> None:
        super().__init__("this note was changed elsewhere since it was shown here")
        self.note = note


class Notes:
    """Those of one run of `d_sae` latents."""

    def __init__(self, run: Path, d_sae: int) -> None:
        self._run, self._d_sae = run, d_sae

    @property
    def path(self) -> Path:
        """The file."""
        return self._run / NOTES_FILE

    def read(self) -> dict[int, Note]:
        """Latent -> its note; of latents that the run has. Raises UserError when the file is not what this version
        writes."""
        return {latent: note for latent, note in self._content().latents.items() if latent < self._d_sae}

    def shown(self) -> dict[str, dict[str, Any]]:
        """For the pages: those that say something."""
        return {
            str(latent): note.model_dump(mode="json")
            for latent, note in sorted(self.read().items())
            if note.star or note.text
        }

    def keep(self, new: NewNote) -> Note:
        """Replace one note. Raises NoteChanged when it is not the one that `new` was written on any more, and UserError
        when it cannot be kept."""
        check_latents(self._d_sae, [new.latent])
        with self._lock():
            content = self._content()
            old = content.latents.get(new.latent, Note())
            if old.changes != new.changes:
                raise NoteChanged(old)
            note = Note(star=new.star, text=new.text, changes=old.changes + 1)
            latents = {**content.latents, new.latent: note}
            try:
                publish_json(self.path, NotesFile(latents=latents).model_dump(mode="json"))
            except OSError as error:
                raise self._cannot_be_kept(error) from error
        return note

    def _content(self) -> NotesFile:
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise UserError(f"{self.path} has more than {_MAX_BYTES:,} bytes; it is no file of notes, move it away")
            return NotesFile.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return NotesFile()
        except (OSError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
            raise UserError(f"{self.path} cannot be read as notes ({why}); correct it or move it away") from error

    def _cannot_be_kept(self, error: OSError) -> UserError:
        return UserError(
            f"notes cannot be kept in {self._run} ({error.strerror}); free some space or fix the permissions"
        )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Changes come one after another, from whatever process; the lock goes with the process."""
        try:
            file = (self._run / _LOCK_FILE).open("w")
        except OSError as error:
            raise self._cannot_be_kept(error) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
