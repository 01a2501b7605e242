"""Search in the text of all windows of all latents, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError

from ..samples_file import WINDOWS_FILE

MAX_QUERY = 200
_FIRING = ("top", "decile")


@dataclass(frozen=True, slots=True)
class WindowIndex:
    """The lower-case text of every window in which its latent fires; about 200 bytes a window."""

    _latents: Any
    """int32 array [n_windows]."""
    _texts: Any
    """large_string array [n_windows]."""

    @classmethod
    def read(cls, samples: Path, text_of: Callable[[int], str]) -> WindowIndex:
        """Of the samples in the folder `samples`. Raises UserError when they cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pc = _compute()

        try:
            table = pq.read_table(samples / WINDOWS_FILE, columns=["latent", "kind", "tokens"])
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{samples / WINDOWS_FILE} cannot be read ({error}); run evaluate samples again") from error
        table = table.filter(pc.is_in(table["kind"], value_set=pa.array(_FIRING))).combine_chunks()
        if len(table) == 0:
            return cls(pa.array([], pa.int32()), pa.array([], pa.large_string()))
        # Joined by the library, token texts from a dictionary: a loop over all tokens would take minutes for 65,536
        # latents.
        texts = []
        for chunk in table["tokens"].chunks:
            found = chunk.flatten().dictionary_encode()
            words = pa.array([text_of(token).lower() for token in found.dictionary.to_pylist()], pa.large_string())
            ends = pc.cumulative_sum(pc.list_value_length(chunk).cast(pa.int64()))
            offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
            lists = pa.LargeListArray.from_arrays(offsets, words.take(found.indices))
            texts.append(pc.binary_join(lists, pa.scalar("", pa.large_string())))
        return cls(table["latent"].combine_chunks(), pa.concat_arrays(texts))

    def find(self, query: str) -> list[int]:
        """Latents with a window that holds `query`, in rising order; case does not count."""
        pc = _compute()
        found = pc.match_substring(self._texts, query.lower())
        return sorted(pc.unique(self._latents.filter(found)).to_pylist())


def _compute() -> Any:
    """pyarrow.compute, whose functions are made at import where no type checker sees them."""
    import pyarrow.compute as pc

    return pc
