"""Which part of the text each row belongs to: position, token frequency, document. And what each comes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.shards import ShardSet

from ..result import finite
from ..rows.batches import RowBatch, documents_of
from .bootstrap import central
from .records import DocumentSpread, L0Spread, Stratum
from .strata import StrataSums, row_columns

FREQUENCY_DECADES = (-6, -5, -4, -3, -2)
"""log10 of the share of train tokens; tokens that train never saw are a stratum of their own."""
QUANTILE_LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MIN_DOCUMENT_ROWS = 32
"""Documents with fewer evaluated rows say little about themselves."""


@dataclass(frozen=True)
class Partition:
    """Names of the parts and the part of every possible key."""

    names: tuple[str, ...]
    part_of: Tensor
    """[n_keys] int64"""


def position_partition(ctx_len: int) -> Partition:
    """Positions 1, 2-3, 4-7, ... of a context (0 is the BOS token where there is one)."""
    positions = torch.arange(ctx_len)
    part_of = torch.where(positions > 0, positions.clamp_min(1).double().log2().floor().long() + 1, 0)
    names = []
    for part in range(int(part_of.max()) + 1):
        members = (part_of == part).nonzero().flatten()
        first, last = int(members[0]), int(members[-1])
        names.append(str(first) if first == last else f"{first}-{last}")
    return Partition(tuple(names), part_of)


def frequency_partition(counts: Tensor) -> Partition:
    """Token ids by how often the train split holds them; `counts` [n_ids] int64."""
    share = counts.double() / max(int(counts.sum()), 1)
    edges = torch.tensor([10.0**decade for decade in FREQUENCY_DECADES], dtype=torch.float64)
    part_of = torch.where(counts > 0, torch.bucketize(share, edges, right=True) + 1, 0)
    bounds = [f"1e{decade}" for decade in FREQUENCY_DECADES]
    between = [f"{low} to {high}" for low, high in zip(bounds, bounds[1:], strict=False)]
    return Partition(("not in train", f"below {bounds[0]}", *between, f"{bounds[-1]} and more"), part_of)


def train_token_counts(shards: ShardSet) -> Tensor:
    """How often each token id occurs in the train split, int64 [n_ids]; ids that only val holds have count 0."""
    largest = max(int(shards.val.tokens(shard).max()) for shard in range(shards.val.n_shards))
    counts = torch.zeros(largest + 1, dtype=torch.int64)
    for shard in range(shards.train.n_shards):
        found = torch.bincount(shards.train.tokens(shard).flatten(), minlength=len(counts))
        counts = torch.nn.functional.pad(counts, (0, len(found) - len(counts))) + found
    return counts


class Breakdown:
    """Sums by position, token frequency and document in one place.

    Memory is that of the documents that the rows are from: d_out * 8 bytes each.
    """

    SUMS = ("_sums",)

    def __init__(self, shards: ShardSet, n_prefixes: int, split: str = "val", limit: int | None = None) -> None:
        """`limit` as in `row_batches`."""
        self._positions = position_partition(shards.ctx_len)
        self._frequencies = frequency_partition(train_token_counts(shards))
        self._documents = documents_of(shards.split(split), limit)
        sizes = (len(self._positions.names), len(self._frequencies.names), len(self._documents))
        self._sums = [StrataSums(size, n_prefixes, shards.d_out) for size in sizes]

    def add(self, batch: RowBatch, y: Tensor, sq_err: Tensor, l0: Tensor) -> None:
        """Add a batch: targets `y` [rows, d_out], `sq_err` and `l0` [n_prefixes, rows]."""
        keys = (
            self._positions.part_of[batch.positions],
            self._frequencies.part_of[batch.tokens.long()],
            torch.searchsorted(self._documents, batch.doc_ids.long()),
        )
        columns = row_columns(y, sq_err, l0)
        for sums, strata in zip(self._sums, keys, strict=True):
            sums.add_columns(strata, y, columns)

    @property
    def n_documents(self) -> int:
        """Documents that the rows are from."""
        return len(self._documents)

    def by_position(self) -> tuple[Stratum, ...]:
        """The parts of the context that have rows."""
        return _strata(self._positions, self._sums[0])

    def by_token_frequency(self) -> tuple[Stratum, ...]:
        """The frequency classes that have rows."""
        return _strata(self._frequencies, self._sums[1])

    def by_document(self) -> DocumentSpread:
        """Quantiles over documents of their FVU."""
        sums = self._sums[2]
        fvu = sums.fvu()[sums.n_rows >= MIN_DOCUMENT_ROWS]
        fvu = fvu[~fvu.isnan().any(1)]
        levels = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64)
        quantiles = tuple(tuple(row) for row in fvu.quantile(levels, dim=0).T.tolist()) if len(fvu) > 0 else None
        return DocumentSpread(
            n_documents=len(fvu),
            min_rows=MIN_DOCUMENT_ROWS,
            quantile_levels=QUANTILE_LEVELS,
            fvu_quantiles=quantiles,
        )

    def uncertainty(self, l0_histogram: Tensor, n_draws: int, seed: int) -> L0Spread:
        """Quantiles of single rows' L0, from `l0_histogram` [n_prefixes, values], and intervals over documents."""
        drawn = self._sums[2].drawn(n_draws, seed)
        return L0Spread(
            quantile_levels=QUANTILE_LEVELS,
            l0_quantiles=tuple(histogram_quantiles(counts, QUANTILE_LEVELS) for counts in l0_histogram),
            fvu_interval=None if drawn is None else central(drawn[0]),
            l0_interval=None if drawn is None else central(drawn[1]),
        )


def histogram_quantiles(counts: Tensor, levels: tuple[float, ...]) -> tuple[int, ...]:
    """The smallest value at which the share of rows reaches each level; `counts` [values] rows that have each value."""
    reached = counts.cumsum(0).double() / counts.sum()
    return tuple(torch.searchsorted(reached, torch.tensor(levels, dtype=torch.float64)).tolist())


def _strata(partition: Partition, sums: StrataSums) -> tuple[Stratum, ...]:
    variance, fvu, l0 = sums.variance(), sums.fvu().tolist(), sums.mean_l0().tolist()
    share = (variance / variance.sum()).tolist()
    return tuple(
        Stratum(
            name=name,
            n_rows=int(sums.n_rows[i]),
            share_of_variance=finite(share[i]),
            fvu=tuple(finite(value) for value in fvu[i]),
            l0=tuple(finite(value) for value in l0[i]),
        )
        for i, name in enumerate(partition.names)
        if sums.n_rows[i] > 0
    )
