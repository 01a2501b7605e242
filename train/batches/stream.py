"""Shuffled batches of activation pairs: a pure function of (seed, step) over the position-major shards.

An epoch permutes all chunks of all shards. The permuted rows are dealt to `n_streams` virtual streams in equal parts;
each stream reads its part in blocks of whole chunks and permutes the rows inside a block; a batch takes the same
number of rows from every stream. A chunk already holds a few positions of EVERY context of its shard, so a batch mixes
documents well with a small buffer. Epochs follow each other without a gap and every row comes once in each, so the
cursor of a run is its step. Nothing here depends on timing, threads or read-ahead.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.threads import keep_thread_count, use_one_thread

from .set_aside import SetAside

ORDER = 3
"""Raised when the same seed comes to mean other batches: a run must not go on with them. 2: blocks stay within the
buffer. 3: rows are set aside for the threshold."""
MAX_STREAMS = 8
_READ_AHEAD_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one optimizer step, bfloat16 on the CPU."""

    source: Tensor
    """[batch_rows, d_in]"""
    target: Tensor
    """[batch_rows, d_out]"""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Kept rows [start, stop) of one chunk."""

    shard: int
    position: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _StreamPlan:
    """What one virtual stream reads in one epoch: its blocks, and where each begins in the stream's row sequence."""

    blocks: tuple[tuple[_Piece, ...], ...]
    starts: tuple[int, ...]


class Stream:
    """The training rows of a shard set in shuffled order; special positions are left out."""

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_rows: int,
        buffer_rows: int,
        seed: int,
        max_norm: float | None = None,
        n_readers: int = 1,
        part: tuple[int, int] = (0, 1),
        pin_memory: bool = False,
        aside: SetAside | None = None,
    ) -> None:
        """`max_norm` leaves out rows whose source norm exceeds that multiple of the median, `aside` its contexts.

        `n_readers` threads read and decode blocks ahead; the batches do not depend on it. `part` (i, n) gives the i-th
        of n equal parts of every batch, and reads only what that needs: the parts one after another are the batch.
        """
        self._shards = shards
        self._split = shards.train
        self._seed = seed
        self._pin = pin_memory
        self._aside = aside
        self._n_readers = n_readers
        self.batch_rows = batch_rows
        self.n_streams = next(n for n in range(min(MAX_STREAMS, batch_rows), 0, -1) if batch_rows % n == 0)
        index, n_parts = part
        if self.n_streams % n_parts:
            raise UserError(
                f"a batch of {batch_rows} rows is dealt from {self.n_streams} streams, which {n_parts} ranks cannot "
                f"share equally; use 1, 2, 4 or {MAX_STREAMS} ranks and a batch that is a multiple of {MAX_STREAMS}"
            )
        per_part = self.n_streams // n_parts
        self._own = range(index * per_part, (index + 1) * per_part)
        self._block_rows = max(1, buffer_rows // self.n_streams)
        self._norm_bound = None if max_norm is None else max_norm * shards.norm_quantiles("source")[0.5]
        self._dropped: list[Tensor] = []
        self._chunks = self._count_chunks()
        self.n_rows = sum(piece.stop for piece in self._chunks)
        if self.n_rows < batch_rows:
            beside = "" if aside is None else f" (beside the {aside.n_rows} that are set aside for the threshold)"
            raise UserError(
                f"{shards.path} has {self.n_rows} training rows{beside}, fewer than one batch of {batch_rows}; use a "
                "smaller --batch-tokens or harvest more"
            )
        self._stream_plan = lru_cache(maxsize=4 * self.n_streams)(self._make_stream_plan)
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of the steps [start, stop). Reading goes on in the background; close the iterator to end it."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_READ_AHEAD_BATCHES)
        ended = threading.Event()
        keep_thread_count()
        producer = threading.Thread(target=self._produce, args=(start, stop, ready, ended), name="batches", daemon=True)
        producer.start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ended.set()
            producer.join()
            keep_thread_count()

    def _produce(
        self, start: int, stop: int, ready: queue.Queue[Batch | BaseException], ended: threading.Event
    ) -> None:
        try:
            use_one_thread()
            with ThreadPoolExecutor(self._n_readers, "chunks", initializer=use_one_thread) as executor:
                cursors = [_StreamCursor(self, stream, executor) for stream in self._own]
                for step in range(start, stop):
                    batch = self._assemble(step, cursors)
                    while not ended.is_set():
                        try:
                            ready.put(batch, timeout=0.1)
                            break
                        except queue.Full:
                            continue
                    if ended.is_set():
                        executor.shutdown(cancel_futures=True)
                        return
        except BaseException as error:  # handed to the consumer, which raises it
            while not ended.is_set():
                try:
                    ready.put(error, timeout=0.1)
                    return
                except queue.Full:
                    continue

    def _assemble(self, step: int, cursors: list[_StreamCursor]) -> Batch:
        n = self.batch_rows // self.n_streams
        n_rows = n * len(cursors)
        source = torch.empty(n_rows, self._shards.d_in, dtype=torch.bfloat16, pin_memory=self._pin)
        target = torch.empty(n_rows, self._shards.d_out, dtype=torch.bfloat16, pin_memory=self._pin)
        for number, cursor in enumerate(cursors):
            here = slice(number * n, (number + 1) * n)
            cursor.copy(step * n, source[here], target[here])
        return Batch(source, target)

    def stream_rows(self, stream: int) -> int:
        """Rows of one virtual stream in an epoch; the parts differ by one row at most."""
        return (stream + 1) * self.n_rows // self.n_streams - stream * self.n_rows // self.n_streams

    def stream_plan(self, epoch: int, stream: int) -> _StreamPlan:
        """The blocks of one virtual stream in one epoch."""
        return self._stream_plan(epoch, stream)

    def permutation(self, epoch: int, stream: int, block: int, n_rows: int) -> Tensor:
        """Order of the rows inside one block."""
        return torch.from_numpy(self._generator(1, epoch, stream, block).permutation(n_rows))

    @property
    def n_bytes(self) -> int:
        """What reading takes: two blocks of every stream, the batches read ahead, the one being filled and the one in
        use."""
        blocks = 2 * len(self._own) * self._most_rows
        batches = (_READ_AHEAD_BATCHES + 2) * self.batch_rows * len(self._own) // self.n_streams
        return 2 * (blocks + batches) * (self._shards.d_in + self._shards.d_out)

    @property
    def _most_rows(self) -> int:
        """At most the rows of the largest block of a virtual stream: a share of the buffer, or one chunk if larger."""
        stream, chunk = -(-self.n_rows // self.n_streams), max(piece.stop for piece in self._chunks)
        return min(stream, max(self._block_rows, chunk))

    def memory(self) -> tuple[Tensor, Tensor]:
        """Memory for the largest block of a virtual stream: source and target, bfloat16."""
        source = torch.empty(self._most_rows, self._shards.d_in, dtype=torch.bfloat16)
        return source, torch.empty(self._most_rows, self._shards.d_out, dtype=torch.bfloat16)

    def load(self, pieces: tuple[_Piece, ...], memory: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Read the rows of a block, source and target, into the first rows of `memory`."""
        n_rows = sum(piece.stop - piece.start for piece in pieces)
        source, target = (side[:n_rows] for side in memory)
        filled = 0
        for piece in pieces:
            end = piece.position + self._split.chunk_positions
            chosen: Tensor | None = None
            for side, rows in (("source", source), ("target", target)):
                acts = self._split.activations(side, piece.shard, piece.position, end, reuse=True).flatten(0, 1)
                chosen = self._kept_rows(piece, len(acts)) if chosen is None else chosen
                torch.index_select(acts, 0, chosen, out=rows[filled : filled + len(chosen)])
            filled += piece.stop - piece.start
        return source, target

    def _kept_rows(self, piece: _Piece, n_rows: int) -> Tensor:
        """Where the rows of a piece are among the `n_rows` of its chunk, from what _count_chunks has noted: a
        shard's tokens would otherwise be read again for every one of its chunks."""
        dropped = self._dropped[piece.shard]
        begin = piece.position // self._split.chunk_positions * n_rows
        first, last = torch.searchsorted(dropped, torch.tensor([begin, begin + n_rows])).tolist()
        if first == last:
            return torch.arange(piece.start, piece.stop)
        keep = torch.ones(n_rows, dtype=torch.bool)
        keep[dropped[first:last] - begin] = False
        return keep.nonzero().squeeze(1)[piece.start : piece.stop]

    def _kept(self, shard: int) -> Tensor:
        """Rows of a shard that are trained on, bool [ctx_len, n_contexts]."""
        keep = self._split.keep(shard)
        if self._aside is not None:
            keep = keep & ~self._aside.mask(shard)
        if self._norm_bound is not None:
            keep &= self._shards.row_norms("source", shard) <= self._norm_bound
        return keep

    def _count_chunks(self) -> list[_Piece]:
        step = self._split.chunk_positions
        chunks = []
        for shard in range(self._split.n_shards):
            kept = self._kept(shard)
            # The few that are left out, as positions in the rows of the shard.
            self._dropped.append((~kept).flatten().nonzero().squeeze(1))
            counts = kept.sum(1).unflatten(0, (-1, step)).sum(1).tolist()
            chunks += [_Piece(shard, number * step, 0, count) for number, count in enumerate(counts) if count]
        return chunks

    def _epoch_order(self, epoch: int) -> tuple[list[_Piece], list[int]]:
        """The chunks of an epoch in their order, and the number of rows up to the end of each."""
        order = [self._chunks[i] for i in self._generator(0, epoch).permutation(len(self._chunks))]
        return order, list(accumulate(piece.stop for piece in order))

    def _make_stream_plan(self, epoch: int, stream: int) -> _StreamPlan:
        order, ends = self._order(epoch)
        first, last = stream * self.n_rows // self.n_streams, (stream + 1) * self.n_rows // self.n_streams
        blocks: list[tuple[_Piece, ...]] = []
        starts = [0]
        pieces: list[_Piece] = []
        # Blocks of different length at the start keep the streams from all needing a new block at once.
        wanted = self._block_rows * (stream + 1) // self.n_streams
        held = 0
        for i in range(bisect_right(ends, first), len(order)):
            piece, begin = order[i], ends[i] - order[i].stop
            cut = _Piece(piece.shard, piece.position, max(first - begin, 0), min(last - begin, piece.stop))
            if cut.stop <= cut.start:
                break
            if pieces and held + cut.stop - cut.start > wanted:
                blocks.append(tuple(pieces))
                starts.append(starts[-1] + held)
                pieces, held, wanted = [], 0, self._block_rows
            pieces.append(cut)
            held += cut.stop - cut.start
        blocks.append(tuple(pieces))
        return _StreamPlan(tuple(blocks), tuple(starts))

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed & (2**64 - 1), *key])))


class _StreamCursor:
    """Walks one virtual stream forwards; the next block is read into the one half of its memory while the block in the
    other half is used."""

    def __init__(self, stream: Stream, number: int, executor: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._number = number
        self._executor = executor
        self._rows = self._used = stream.memory()
        self._free = stream.memory()
        self._key: tuple[int, int] | None = None
        self._coming: Future[tuple[Tensor, Tensor]] | None = None
        self._coming_key: tuple[int, int] | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def copy(self, position: int, source: Tensor, target: Tensor) -> None:
        """Fill `source` and `target` with the stream's rows from `position` on, counted over all epochs."""
        filled = 0
        while filled < len(source):
            epoch, offset = divmod(position + filled, self._stream.stream_rows(self._number))
            plan = self._stream.stream_plan(epoch, self._number)
            block = bisect_right(plan.starts, offset) - 1
            rows = self._block(epoch, block)
            chosen = self._order[offset - plan.starts[block] :][: len(source) - filled]
            for side, out in zip(rows, (source, target), strict=True):
                torch.index_select(side, 0, chosen, out=out[filled : filled + len(chosen)])
            filled += len(chosen)

    def _block(self, epoch: int, block: int) -> tuple[Tensor, Tensor]:
        if self._key != (epoch, block):
            if self._coming_key != (epoch, block):
                self._read(epoch, block)
            assert self._coming is not None
            self._rows = self._coming.result()
            self._used, self._free = self._free, self._used
            self._key = (epoch, block)
            self._order = self._stream.permutation(epoch, self._number, block, len(self._rows[0]))
            last = block + 1 == len(self._stream.stream_plan(epoch, self._number).blocks)
            self._read(*((epoch + 1, 0) if last else (epoch, block + 1)))
        return self._rows

    def _read(self, epoch: int, block: int) -> None:
        """Begin to read a block into the half that is free. A cursor only goes forwards: nothing else is being read."""
        pieces = self._stream.stream_plan(epoch, self._number).blocks[block]
        self._coming_key = (epoch, block)
        self._coming = self._executor.submit(self._stream.load, pieces, self._free)
