"""Reading a shard set: facts, tokens, and blocks of paired activations. Refuses what is unfinished or damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.held_out import ValUnit
from matryoshka.norms import Norm
from matryoshka.shards import layout
from matryoshka.shards.direct import ShardFiles, open_files
from matryoshka.shards.manifest import MANIFEST_FOLDER, SPLITS, CommitRecord, FileRecord, Manifest, record_name
from matryoshka.shards.records import held, read_manifest, read_records
from matryoshka.shards.scaled import unscale
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, slots=True)
class Block:
    """Some positions of every context of one shard; `source[p, c]` belongs to `tokens[p, c]`."""

    split: str
    shard: int
    first_position: int
    tokens: Tensor
    """[positions, contexts] int32"""
    doc_ids: Tensor
    """[positions, contexts] int32"""
    source: Tensor
    """[positions, contexts, d_in] bfloat16"""
    target: Tensor
    """[positions, contexts, d_out] bfloat16"""
    keep: Tensor
    """[positions, contexts] bool: False at special positions, which never enter training or metrics."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """The kept pairs as (source [rows, d_in], target [rows, d_out])."""
        return self.source[self.keep], self.target[self.keep]


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Mean and variance of each dimension over the non-special train rows, float64 [width]."""

    mean: Tensor
    variance: Tensor


class Split:
    """One split of a shard set."""

    def __init__(self, shard_set: ShardSet, name: str) -> None:
        self._set = shard_set
        self._plan = shard_set.manifest.splits[name]
        self.name = name
        self.shard_contexts = self._plan.shard_contexts
        self.n_shards = self._plan.n_shards
        self.n_contexts = self._plan.n_contexts
        self.chunk_positions = self._plan.chunk_positions
        # A chunk is small, the factors of its shard are not: they are not read again for each.
        self._factors = lru_cache(maxsize=8)(self._read_factors)
        self._files: dict[str, ShardFiles | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # To the workers of a DataLoader: open files and caches stay behind.
        return ShardSet.split, (self._set, self.name)

    def __repr__(self) -> str:
        n_rows = sum(record.n_rows for record in self._set.records if record.split == self.name)
        return f"<{self.name}: {n_rows:,} rows in {self.n_contexts:,} contexts, {self.n_shards} shards>"

    def tokens(self, shard: int) -> Tensor:
        """Token ids of a shard, int32 [n_contexts, ctx_len]."""
        return torch.from_numpy(self._ids("tokens", shard))

    def doc_ids(self, shard: int) -> Tensor:
        """Document of each token of a shard, int32 [n_contexts, ctx_len]."""
        return torch.from_numpy(self._ids("doc_ids", shard))

    @cached_property
    def n_documents(self) -> int:
        """Documents with tokens in this split. Each is counted once, in however many shards it is: they come in order,
        so that only the last of a shard can go on in the next."""
        found, last = 0, None
        for shard in range(self.n_shards):
            doc_ids = self.doc_ids(shard)
            found += len(doc_ids.unique()) - (int(doc_ids[0, 0]) == last)
            last = int(doc_ids[-1, -1])
        return found

    def keep(self, shard: int) -> Tensor:
        """Where a shard's tokens are not special, bool [ctx_len, n_contexts] (position-major, as the activations)."""
        specials = torch.tensor(self._set.manifest.special_ids, dtype=torch.int32)
        return ~torch.isin(self.tokens(shard).T, specials)

    def activations(
        self, side: str, shard: int, start: int = 0, stop: int | None = None, *, reuse: bool = False
    ) -> Tensor:
        """Positions [start, stop) of every context of a shard: bfloat16 [positions, n_contexts, width].

        With `reuse` the thread's next such call for this side may overwrite them; it is for who copies them at once.
        """
        n_contexts = self.shard_contexts[shard]
        stop = self._set.ctx_len if stop is None else stop
        stored = self._stored(side, shard, start, stop, reuse=reuse)[:, :n_contexts]
        if not layout.is_scaled(self._set.manifest):
            return layout.from_bits(stored)
        channel, scale = self._factors(side, shard)
        return unscale(torch.from_numpy(stored), channel, scale[start:stop, :n_contexts])

    def blocks(self) -> Iterator[Block]:
        """All blocks in the order of the disk, one chunk of positions each."""
        for shard in range(self.n_shards):
            tokens, doc_ids, keep = self.tokens(shard).T, self.doc_ids(shard).T, self.keep(shard)
            for start in range(0, self._set.ctx_len, self.chunk_positions):
                here = slice(start, start + self.chunk_positions)
                yield Block(
                    split=self.name,
                    shard=shard,
                    first_position=start,
                    tokens=tokens[here],
                    doc_ids=doc_ids[here],
                    source=self.activations("source", shard, here.start, here.stop),
                    target=self.activations("target", shard, here.start, here.stop),
                    keep=keep[here],
                )

    def _stored(self, side: str, shard: int, start: int, stop: int, *, reuse: bool = False) -> np.ndarray:
        """Positions of a shard as they are stored: from its file where that can be read directly, else through Zarr."""
        if side not in self._files:
            self._files[side] = open_files(self._set.storage, self._array(side), f"{self.name}/{side}")
        files = self._files[side]
        found = None if files is None else files.read(shard, start, stop, reuse=reuse)
        return self._array(side)[shard, start:stop] if found is None else found

    def _ids(self, name: str, shard: int) -> np.ndarray:
        return self._array(name)[shard, : self.shard_contexts[shard]]

    def _read_factors(self, side: str, shard: int) -> tuple[Tensor, Tensor]:
        """Of the int8 codec: channel [width] and scale [ctx_len, contexts], float32."""
        channel, scale = (self._array(f"{side}_{name}")[shard] for name in ("channel", "scale"))
        return torch.from_numpy(channel), torch.from_numpy(scale)

    def _array(self, name: str) -> Any:
        return self._set.root[f"{self.name}/{name}"]


class ShardSet:
    """A finished shard set, read-only.

    >>> shards = ShardSet.open("data/l17")          # doctest: +SKIP
    >>> for block in shards.val.blocks(): x, y = block.rows()          # doctest: +SKIP
    """

    def __init__(self, storage: Storage, manifest: Manifest, records: list[CommitRecord], root: zarr.Group) -> None:
        self.storage = storage
        self.manifest = manifest
        self.records = records
        self.root = root
        self.train = Split(self, "train")
        self.val = Split(self, "val")

    @classmethod
    def open(cls, path: str | Path | Storage, *, verify: bool = False) -> ShardSet:
        """Open a finished set in a folder or at a URL; with `verify` every file is read and its crc32c checked.

        Raises UserError when there is no shard set, when it is unfinished, or misses or differs from what was
        committed.
        """
        storage = open_storage(path)
        manifest = read_manifest(storage)
        records = read_records(storage)
        planned = {
            (split, shard): n_contexts
            for split, plan in manifest.splits.items()
            for shard, n_contexts in enumerate(plan.shard_contexts)
        }
        committed = {(record.split, record.shard): record.n_contexts for record in records}
        if not manifest.complete or committed.keys() != planned.keys():
            raise UserError(
                f"{storage} is unfinished: it has {len(records)} of {len(planned)} shards. Run the harvest command "
                "that made it again, with the same settings, to finish it"
            )
        sizes = storage.sizes(
            held(storage, (key for files in (*(r.files for r in records), manifest.summary) for key in files))
        )
        for record in records:
            keys = layout.shard_keys(manifest, record.split, record.shard)
            if committed[record.split, record.shard] != planned[record.split, record.shard]:
                raise _damaged(storage, record.name, "does not hold the contexts that the manifest says")
            _check_files(storage, record.files, keys, record.name, sizes, verify=verify)
        first = record_name("train", 0)
        _check_files(storage, manifest.summary, layout.summary_keys(manifest), first, sizes, verify=verify)
        return cls(storage, manifest, records, layout.open_root(storage, writable=False))

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens it anew: no handle of a file or a connection goes along.
        return ShardSet.open, (self.path,)

    def __repr__(self) -> str:
        source, target = (
            f"{side.site} of layer {side.layer} ({side.width})" for side in (self.manifest.source, self.manifest.target)
        )
        return (
            f"ShardSet({str(self.path)!r}: {source} -> {target} of {self.manifest.model.get('model')}, contexts of "
            f"{self.ctx_len}, {self.train}, {self.val}, held-out {self.val_unit}s)"
        )

    @property
    def path(self) -> Path | str:
        """Where it is: a folder as Path, or a URL as str."""
        return self.storage.location

    @property
    def name(self) -> str:
        """Last part of where it is: `l17`."""
        return self.storage.name

    @property
    def d_in(self) -> int:
        """Width of the source."""
        return self.manifest.source.width

    @property
    def d_out(self) -> int:
        """Width of the target."""
        return self.manifest.target.width

    @property
    def ctx_len(self) -> int:
        """Positions in a context."""
        return self.manifest.ctx_len

    @property
    def val_unit(self) -> ValUnit:
        """What val is made of: documents that train never saw, or blocks of documents that may be in train too."""
        return self.manifest.val_unit

    def split(self, name: str) -> Split:
        """`train` or `val`."""
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}; the splits are {', '.join(SPLITS)}")
        return self.train if name == "train" else self.val

    @cached_property
    def digest(self) -> str:
        """Identity of the content: settings and the checksums of every committed file."""
        sums = [
            [record.name, key, file.crc32c] for record in self.records for key, file in sorted(record.files.items())
        ]
        return hashlib.sha256(f"{self.manifest.digest()}{sums}".encode()).hexdigest()

    @cached_property
    def norm(self) -> Norm | None:
        """The norm behind the source site, from which input conventions are derived."""
        facts = self.manifest.norm
        if facts is None:
            return None
        bias = torch.from_numpy(self._array("norm/bias")) if facts.has_bias else None
        return Norm(kind=facts.kind, eps=facts.eps, gain=torch.from_numpy(self._array("norm/gain")), bias=bias)

    def stats(self, site: str) -> SiteStats:
        """Statistics of `source`, `target`, `normalized` (source after its norm) or `with_gain` (and its gain)."""
        if site == "with_gain":
            normalized, norm = self.stats("normalized"), self.norm
            assert norm is not None
            gain = norm.gain.double()
            bias = 0 if norm.bias is None else norm.bias.double()
            return SiteStats(mean=normalized.mean * gain + bias, variance=normalized.variance * gain.square())
        if f"stats/{site}/mean" not in self.root:
            known = ", ".join(layout.stat_sites(self.manifest))
            raise UserError(f"{self.path} has no statistics of {site!r}; it has those of {known}")
        mean, variance = self._array(f"stats/{site}/mean"), self._array(f"stats/{site}/variance")
        return SiteStats(mean=torch.from_numpy(mean), variance=torch.from_numpy(variance))

    def norm_quantiles(self, side: str) -> dict[float, float]:
        """Quantile -> row norm, over the non-special train rows of `source` or `target`."""
        attributes = self.root[f"stats/{side}/row_norm"].attrs.asdict()
        levels: Any = attributes["quantiles"]
        values: Any = attributes["values"]
        return dict(zip(levels, values, strict=True))

    def row_norms(self, side: str, shard: int) -> Tensor:
        """Norms of the train rows of a shard, float32 [ctx_len, n_contexts]: sinks are found without reading rows."""
        array: Any = self.root[f"stats/{side}/row_norm"]
        return torch.from_numpy(array[shard, :, : self.train.shard_contexts[shard]])

    def bytes_on_disk(self) -> int:
        """Size of all committed files."""
        return sum(file.size for record in self.records for file in record.files.values())

    def _array(self, name: str) -> np.ndarray:
        array: Any = self.root[name]
        return array[:]


def problem_with(
    storage: Storage, files: Mapping[str, FileRecord], keys: Sequence[str], sizes: Mapping[str, int], *, verify: bool
) -> str | None:
    """What is wrong with the files of one record, or None. Presence and size always, crc32c on request.

    Zarr itself would read a missing file as zeros. `sizes` are those of the files there are.
    """
    for key, expected in files.items():
        size = sizes.get(key)
        if size is None:
            return f"misses {key}"
        if size != expected.size:
            return f"has {size} bytes in {key}, not {expected.size}"
        if verify and storage.checksum(key) != expected:
            return f"differs from its checksum in {key}"
    if files.keys() != set(keys):
        return "does not vouch for exactly the files of its shard"
    return None


def _check_files(
    storage: Storage,
    files: Mapping[str, FileRecord],
    keys: Sequence[str],
    record: str,
    sizes: Mapping[str, int],
    *,
    verify: bool,
) -> None:
    """`record` names the commit record that has to go for the files to be written again."""
    problem = problem_with(storage, files, keys, sizes, verify=verify)
    if problem is not None:
        raise _damaged(storage, record, problem)


def _damaged(path: Storage, record: str, problem: str) -> UserError:
    return UserError(
        f"{path} is damaged: what {MANIFEST_FOLDER}/{record} describes {problem}. Delete that record and run the same "
        f"harvest command again to rewrite this shard alone; `harvest verify {path} --repair` does both"
    )
