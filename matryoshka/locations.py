"""Where a shard set is: a folder, or the URL of an object store such as s3://bucket/l17."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Annotated
from urllib.parse import unquote, urlparse

from pydantic import BeforeValidator

from matryoshka.errors import UserError

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FOLDED = re.compile(r"(s3a?|gs|gcs|az|adl|abfss?|azure):/(?=[^/])")
"""What `Path` makes of s3://bucket. Nobody has a folder s3: with a bucket in it."""


def expand(text: str) -> str:
    """Text that names a file, with `~` and `~user` at its start as the home folder.

    Shells do this only where the text is a word of its own, and nothing does it in a settings file. Raises UserError
    for a variable, which would otherwise become a folder of that name.
    """
    if (variable := _VARIABLE.search(text)) is not None:
        raise UserError(
            f"{text} has the variable {variable[0]}, which is not expanded here. Write the folder out, or use ~ for "
            "the home folder"
        )
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise UserError(f"{text} names the home folder of a user that this machine does not know") from error


def local_path(value: str | Path) -> Path:
    """The file or folder that a user named. Raises UserError as `expand`."""
    return Path(expand(str(value)))


def parse_location(value: object) -> object:
    """A URL as str, without slashes at its end; any other text, and file:// URLs, as Path. Not text: as it is."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if (folded := _FOLDED.match(text)) is not None:
        text = f"{folded[1]}://{text[folded.end() :]}"
    if _URL.match(text) is None:
        return local_path(text)
    if text.startswith("file://"):
        # Not a web address: # and ? are parts of names.
        return Path(unquote(urlparse(text.replace("#", "%23").replace("?", "%3F")).path))
    return text.rstrip("/")


LocalPath = Annotated[
    Path, BeforeValidator(lambda value: local_path(value) if isinstance(value, str | Path) else value)
]
"""In settings: a file or folder of this machine."""

Name = Annotated[str, BeforeValidator(lambda value: expand(value) if isinstance(value, str) else value)]
"""In settings: a file or folder, or a name on the hub."""

Location = Annotated[Path | str, BeforeValidator(parse_location)]
"""In settings: a folder as Path, or a URL as str."""


def location(value: str | Path) -> Path | str:
    """`parse_location` of text: where the user says that something is."""
    found = parse_location(value)
    assert isinstance(found, str | Path)
    return found


def location_name(place: str | Path) -> str:
    """The last part of a location: l17, of data/l17 and of s3://bucket/l17."""
    found = location(place)
    if isinstance(found, Path):
        return found.resolve().name
    return found.rpartition("/")[2]


def portable_name(name: str) -> str:
    """The name of a model or a text as it is on every machine: of an absolute path only the last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def inside(place: str | Path, name: str) -> Path | str:
    """The location `name` in the folder, or under the URL, `place`."""
    found = location(place)
    return found / name if isinstance(found, Path) else f"{found}/{name}"
