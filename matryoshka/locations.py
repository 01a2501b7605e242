"""Where a shard set lies: a folder, or the URL of an object store such as s3://bucket/l17."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlparse

from pydantic import BeforeValidator

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FOLDED = re.compile(r"(s3a?|gs|gcs|az|adl|abfss?|azure):/(?=[^/])")
"""What `Path` makes of s3://bucket. Nobody has a folder s3: with a bucket in it."""


def parse_location(value: object) -> object:
    """A URL as str, without slashes at its end; any other text, and file:// URLs, as Path. Not text: as it is."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if (folded := _FOLDED.match(text)) is not None:
        text = f"{folded[1]}://{text[folded.end() :]}"
    if _URL.match(text) is None:
        return Path(text)
    parts = urlparse(text)
    return Path(unquote(parts.path)) if parts.scheme == "file" else text.rstrip("/")


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


def inside(place: str | Path, name: str) -> Path | str:
    """The location `name` in the folder, or under the URL, `place`."""
    found = location(place)
    return found / name if isinstance(found, Path) else f"{found}/{name}"
