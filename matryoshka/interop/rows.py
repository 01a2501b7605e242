"""The rows of a shard set for other people's code: a torch IterableDataset, and a stream of Arrow record batches.

Our own training does not come through here: train/batches/stream.py shuffles over the whole set and resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.sites import input_conventions

if TYPE_CHECKING:
    import pyarrow as pa


class RowDataset(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches (source [rows, d_in], target [rows, d_out]) of the rows that are not special, float32.

    Batches have `batch_rows` rows, but for the last one of a worker. The workers of a DataLoader share the shards out.

    >>> dataset = RowDataset(ShardSet.open("data/l17"), input="normalized", seed=0)          # doctest: +SKIP
    >>> loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)          # doctest: +SKIP
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str = "train",
        *,
        input: str | None = None,  # noqa: A002 -- the name of the config key
        batch_rows: int = 4096,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            input: convention of the source: `resid_mid` (raw, the default), `normalized` or `mlp_in`.
            seed: of the order; shards, the chunks of a shard and the rows of a chunk are shuffled, each among
                themselves. Another epoch is another seed. None keeps the order of the disk.
        """
        if batch_rows < 1:
            raise UserError(f"batch_rows is {batch_rows}; it must be 1 or more")
        site = shards.manifest.source.site
        if input is not None and input not in input_conventions(site):
            raise UserError(f"input {input!r} does not exist for {site}; choose {', '.join(input_conventions(site))}")
        shards.split(split)
        self._shards = shards
        self._split = split
        self._input = site if input is None else input
        self._batch_rows = batch_rows
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source, target = [], []
        n_waiting = 0
        for x, y in self._chunks():
            source.append(x)
            target.append(y)
            n_waiting += len(x)
            if n_waiting >= self._batch_rows:
                xs, ys = torch.cat(source), torch.cat(target)
                whole = n_waiting - n_waiting % self._batch_rows
                yield from zip(xs[:whole].split(self._batch_rows), ys[:whole].split(self._batch_rows), strict=True)
                source, target, n_waiting = [xs[whole:]], [ys[whole:]], n_waiting - whole
        if n_waiting:
            yield torch.cat(source), torch.cat(target)

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The kept rows of one chunk after the other, of this worker's shards."""
        split, site = self._shards.split(self._split), self._shards.manifest.source.site
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        order = self._order(split.n_shards, salt=0)
        for shard in order[first::step]:
            keep = split.keep(shard)
            starts = range(0, self._shards.ctx_len, split.chunk_positions)
            for chunk in self._order(len(starts), salt=shard + 1):
                here = slice(starts[chunk], starts[chunk] + split.chunk_positions)
                wanted = keep[here]
                x = split.activations("source", shard, here.start, here.stop)[wanted]
                y = split.activations("target", shard, here.start, here.stop)[wanted].float()
                x = apply_convention(x, self._input, source_site=site, norm=self._shards.norm)
                rows = self._order(len(x), salt=-1 - shard * len(starts) - chunk)
                yield (x, y) if self._seed is None else (x[rows], y[rows])

    def _order(self, n: int, salt: int) -> list[int]:
        if self._seed is None:
            return list(range(n))
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + salt) % 2**63)
        return torch.randperm(n, generator=generator).tolist()


def arrow_schema(shards: ShardSet) -> pa.Schema:
    """Columns of `arrow_batches`. Arrow has no bfloat16; float32 holds it exactly."""
    import pyarrow as pa

    return pa.schema(
        [
            ("shard", pa.int32()),
            ("context", pa.int32()),
            ("position", pa.int32()),
            ("token", pa.int32()),
            ("doc_id", pa.int32()),
            ("source", pa.list_(pa.float32(), shards.d_in)),
            ("target", pa.list_(pa.float32(), shards.d_out)),
        ]
    )


def arrow_batches(shards: ShardSet, split: str = "train") -> pa.RecordBatchReader:
    """The rows that are not special as a stream of Arrow batches, in the order of the disk, one chunk a batch.

    `context` counts within the shard. Takes no more memory than a chunk:

    >>> polars.from_arrow(arrow_batches(shards, "val"))          # doctest: +SKIP
    """
    import pyarrow as pa

    schema = arrow_schema(shards)

    def batches() -> Iterator[pa.RecordBatch]:
        for block in shards.split(split).blocks():
            positions, contexts = block.keep.nonzero(as_tuple=True)
            if len(positions) == 0:
                continue
            columns: list[Any] = [
                torch.full_like(positions, block.shard),
                contexts,
                positions + block.first_position,
                block.tokens[block.keep],
                block.doc_ids[block.keep],
            ]
            arrays: list[pa.Array] = [pa.array(column.int().numpy()) for column in columns]
            for side, width in ((block.source, shards.d_in), (block.target, shards.d_out)):
                values = pa.array(side[block.keep].float().flatten().numpy())
                arrays.append(pa.FixedSizeListArray.from_arrays(values, width))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())
