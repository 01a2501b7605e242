"""What a harvest will cost, before it starts: disk and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.shards import CommitRecord, Manifest
from matryoshka.shards.layout import RATIO
from matryoshka.shards.manifest import BYTES_PER_VALUE
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage

_RESERVE_BYTES = 64 * 2**20
"""Left free on the disk, so that a full one is not found by the last shard."""
_ID_BYTES = 2.0
"""Tokens and document ids of a row after compression, about; and the row norms."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Disk and time that the uncommitted part of a harvest needs."""

    n_tokens: int
    n_bytes: int
    free_bytes: int | None
    """None where nobody knows: in an object store."""
    seconds: float | None
    smaller: Mapping[str, int] = field(default_factory=dict)
    """Codec -> bytes with it, of those that need less; none for a set that has shards already."""

    def check(self, folder: Path | str) -> None:
        """Raise UserError when the disk cannot hold it, with what would fit."""
        if self.free_bytes is not None and self.n_bytes + _RESERVE_BYTES > self.free_bytes:
            room = self.free_bytes - _RESERVE_BYTES
            ways = [f"--codec {codec} needs about {gigabytes(size)}" for codec, size in self.smaller.items()]
            fits = max(0, room) * self.n_tokens // self.n_bytes
            ways.append(f"fewer --tokens ({counted(fits)} more fit)" if fits else "fewer --tokens")
            raise UserError(
                f"the disk of {folder} has {gigabytes(self.free_bytes)} free, but this harvest needs about "
                f"{gigabytes(self.n_bytes)}. What helps: {'; '.join(ways)}; or --out with a folder on another disk"
            )


def estimate(
    manifest: Manifest,
    n_tokens: int,
    where: str | Path | Storage,
    tokens_per_second: float | None,
    records: Sequence[CommitRecord] = (),
) -> Estimate:
    """Cost of `n_tokens` more tokens at `where`, which need not exist yet.

    `records` are those of shards that are there: their bytes per token are taken in place of the codec's usual ratio.
    """
    n_bytes = int(n_tokens * (_measured_row_bytes(manifest, records) or _row_bytes(manifest, manifest.codec)))
    others = {} if records else {codec: int(n_tokens * _row_bytes(manifest, codec)) for codec in RATIO}
    return Estimate(
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        free_bytes=open_storage(where).free_bytes(),
        seconds=None if tokens_per_second is None else n_tokens / tokens_per_second,
        smaller={codec: size for codec, size in others.items() if size < n_bytes},
    )


def together(parts: Iterable[Estimate], n_tokens: int, seconds: float | None) -> Estimate:
    """Cost of several sets from one pass of `n_tokens` tokens, all on one disk."""
    parts = list(parts)
    return Estimate(
        n_tokens=n_tokens,
        n_bytes=sum(part.n_bytes for part in parts),
        free_bytes=min((part.free_bytes for part in parts if part.free_bytes is not None), default=None),
        seconds=seconds,
        smaller={
            codec: sum(part.smaller[codec] for part in parts)
            for codec in RATIO
            if parts and all(codec in part.smaller for part in parts)
        },
    )


def gigabytes(n_bytes: float) -> str:
    """A size for people: 97.1 GB, 412 MB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def counted(n_tokens: int) -> str:
    """A number of tokens for people, rounded down: 6.5M, 870k."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n_tokens >= unit:
            return f"{n_tokens * 10 // unit / 10:g}{letter}"
    return str(n_tokens)


def _row_bytes(manifest: Manifest, codec: str) -> float:
    width = manifest.source.width + manifest.target.width
    return width * BYTES_PER_VALUE * RATIO[codec] + _ID_BYTES + 8


def _measured_row_bytes(manifest: Manifest, records: Sequence[CommitRecord]) -> float | None:
    # A shard with room for more contexts than it holds is padded with zeros, which tell nothing of the ratio.
    full = [r for r in records if r.n_contexts == manifest.splits[r.split].contexts]
    n_tokens = sum(record.n_contexts for record in full) * manifest.ctx_len
    return sum(file.size for r in full for file in r.files.values()) / n_tokens if n_tokens else None
