"""What tables call the rows they are of: a number of val means less where val is not made of whole documents."""

from __future__ import annotations

from matryoshka.held_out import ValUnit

_ROWS = {
    ("val", "document"): "held-out rows",
    ("val", "block"): "held-out rows (held-out blocks: train has other parts of the same documents)",
}


def rows_of(split: str, val_unit: ValUnit) -> str:
    """The rows of a split of a shard set, in words; `val_unit` is the shard set's."""
    return _ROWS.get((split, val_unit), "TRAIN rows (seen in training)")
