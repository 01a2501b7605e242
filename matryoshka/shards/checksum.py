"""crc32c of files: Zarr itself would hand out a flipped bit without a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from matryoshka.shards.manifest import FileRecord

_PIECE = 8 * 2**20


def checksum(path: Path) -> FileRecord:
    """Size in bytes and crc32c of the file at `path`, read piece by piece."""

    def pieces() -> Iterator[bytes]:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    return checksum_of(pieces())


def checksum_of(pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Size and crc32c of bytes that come in pieces."""
    import google_crc32c

    crc, size = 0, 0
    for piece in pieces:
        crc = google_crc32c.extend(crc, bytes(piece))  # it takes nothing else; of bytes this is no copy
        size += len(piece)
    return FileRecord(size=size, crc32c=crc)
