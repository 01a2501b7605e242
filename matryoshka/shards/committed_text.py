"""The text of the shards that are committed: more of another text must never be mixed with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards import layout
from matryoshka.shards.manifest import CommitRecord
from matryoshka.shards.records import read_manifest, read_records
from matryoshka.shards.storage import Storage

if TYPE_CHECKING:
    import zarr


class CommittedText:
    """Tokens and documents of what is committed of a set, finished or not. Nothing is written."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._dataset = read_manifest(storage).dataset.get("name")
        self._root = layout.open_root(storage, writable=False, finished=False)
        self._records = {(record.split, record.shard): record for record in read_records(storage)}

    def n_shards(self, split: str) -> int:
        """One more than the number of the last committed shard."""
        return max((shard + 1 for name, shard in self._records if name == split), default=0)

    def check(self, split: str, shard: int, tokens: Tensor, doc_ids: Tensor) -> None:
        """Raise UserError when this shard is committed, and not of these ids, int [n_contexts, ctx_len]."""
        record = self._records.get((split, shard))
        if record is not None:
            check_same_text(self._root, record, tokens, doc_ids, storage=self._storage, dataset=self._dataset)


def check_same_text(
    root: zarr.Group, record: CommitRecord, tokens: Tensor, doc_ids: Tensor, *, storage: Storage, dataset: object
) -> None:
    """Raise UserError unless a committed shard holds exactly these ids, int [n_contexts, ctx_len]."""
    for name, ids in (("tokens", tokens), ("doc_ids", doc_ids)):
        array: Any = root[f"{record.split}/{name}"]
        if not np.array_equal(array[record.shard, : record.n_contexts], ids.numpy()):
            raise UserError(
                f"the text of {dataset} is not what it was when shard {record.shard} of {record.split} of {storage} "
                "was written. Restore the text (or pin its revision), or harvest into a new --out"
            )
