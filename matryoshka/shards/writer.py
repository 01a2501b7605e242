"""Writing a shard set so that it survives a kill or a power cut at any moment.

Order for each shard: its files (each is whole or absent: Zarr's LocalStore writes aside and renames, and in an object
store a PUT does), fsync of files and folders, then the commit record, which alone makes the shard exist. `complete` in
the root attributes comes after the last shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.norms import Norm
from matryoshka.runs import changed_fields, refuse_changes
from matryoshka.shards import layout
from matryoshka.shards.committed_text import check_same_text
from matryoshka.shards.manifest import (
    BYTES_PER_VALUE,
    FILE_FACTS,
    MANIFEST_FOLDER,
    SPLITS,
    CodecError,
    CommitRecord,
    Manifest,
    is_extension,
)
from matryoshka.shards.quantiles import quantiles
from matryoshka.shards.records import ROOT_FILE, has_manifest, read_manifest, read_records
from matryoshka.shards.row_sums import row_sums
from matryoshka.shards.scaled import to_scaled
from matryoshka.shards.storage import Storage
from matryoshka.shards.storage_open import open_storage

if TYPE_CHECKING:
    import zarr

NORM_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
_ARRAY_FOLDERS = (*SPLITS, "stats", "norm")


class ShardSetWriter:
    """The writing side of one shard set.

    One process opens and finishes it; others may join it and write other shards meanwhile. Readers wait for `finish`.
    """

    def __init__(self, storage: Storage, manifest: Manifest, norm: Norm | None, root: zarr.Group) -> None:
        self.storage = storage
        self.manifest = manifest
        self._norm = norm
        self._root = root
        self._arrays: dict[str, Any] = {}
        self._records = {(record.split, record.shard): record for record in read_records(storage)}

    @classmethod
    def open(cls, path: str | Path | Storage, manifest: Manifest, norm: Norm | None) -> ShardSetWriter:
        """Start a shard set at `path`, or go on with one of the same settings, or let it grow to more tokens.

        Raises UserError when `path` holds something else, or a set of other settings (the difference is named).
        """
        storage = open_storage(path)
        check_storage(storage)
        saved = read_manifest(storage) if has_manifest(storage) else None
        grows = saved is not None and _grows(saved, manifest)
        if saved is not None:
            refuse_changes(storage, "harvested", changed_fields(_identity(saved, grows), _identity(manifest, grows)))
        storage.make()
        storage.remove_partials()
        if saved is None or not read_records(storage):
            # Nothing is committed: what a killed start may have left half-made is made again.
            for name in _ARRAY_FOLDERS:
                storage.delete_folder(name)
            storage.delete(ROOT_FILE)
            layout.create_arrays(storage, manifest)
            storage.fsync_metadata()
            saved = manifest
        elif saved.complete or grows or saved.dataset != manifest.dataset:
            # A shard is to be rewritten or added; until the statistics follow, the set must not pass for whole.
            planned: dict[str, Any] = {"summary": {}, "measured": {}, "skipped_lines": {}, "complete": False}
            planned["dataset"] = manifest.dataset
            planned |= {"splits": manifest.splits, "settings": manifest.settings} if grows else {}
            saved = saved.model_copy(update=planned)
            layout.publish(storage, saved)
            storage.fsync([ROOT_FILE])
        root = layout.open_root(storage, writable=True)
        layout.fit_arrays(root, saved)
        return cls(storage, saved, norm, root)

    @classmethod
    def join(cls, path: str | Path | Storage, manifest: Manifest, norm: Norm | None) -> ShardSetWriter:
        """Write shards of a set that another process has opened and will finish. Raises UserError as `open` does."""
        storage = open_storage(path)
        saved = read_manifest(storage)
        refuse_changes(storage, "harvested", changed_fields(_identity(saved, False), _identity(manifest, False)))
        return cls(storage, saved, norm, layout.open_root(storage, writable=True))

    def is_committed(self, split: str, shard: int) -> bool:
        """Whether this shard is whole on disk."""
        return (split, shard) in self._records

    def record(self, split: str, shard: int) -> CommitRecord:
        """The commit record of a committed shard."""
        return self._records[split, shard]

    def bytes_written(self) -> int:
        """Size on disk of all committed shards."""
        # A list, because another thread may be committing a shard.
        return sum(file.size for record in list(self._records.values()) for file in record.files.values())

    def check_same_text(self, split: str, shard: int, tokens: Tensor, doc_ids: Tensor) -> None:
        """Raise UserError unless a committed shard holds exactly these ids [n_contexts, ctx_len].

        A dataset that has changed since would otherwise be mixed with its old self in one set.
        """
        check_same_text(
            self._root,
            self._records[split, shard],
            tokens,
            doc_ids,
            storage=self.storage,
            dataset=self.manifest.dataset.get("name"),
        )

    def write_shard(
        self, split: str, shard: int, tokens: Tensor, doc_ids: Tensor, source: Tensor, target: Tensor
    ) -> CommitRecord:
        """Write and commit one shard.

        tokens, doc_ids: int [n_contexts, ctx_len]; source [ctx_len, n_contexts, d_in] and target
        [ctx_len, n_contexts, d_out]: bfloat16, position-major, on the CPU. Raises UserError on a value that is not
        finite and on a full disk; the shard then does not exist.
        """
        n_contexts = tokens.shape[0]
        sides = {"source": source, "target": target}
        dtype = self.manifest.model.get("weight_dtype")
        largest = {side: _largest(values, side, split, shard, dtype) for side, values in sides.items()}
        keep = ~torch.isin(tokens.T, torch.tensor(self.manifest.special_ids, dtype=tokens.dtype))
        try:
            self._write_ids(split, shard, {"tokens": tokens, "doc_ids": doc_ids})
            errors: dict[str, CodecError] = {}
            for side in sides:
                if layout.is_scaled(self.manifest):
                    # Statistics are of what a reader will get.
                    sides[side], errors[side] = self._write_scaled(split, shard, side, sides[side], keep)
                    largest[side] = _largest(sides[side], side, split, shard, dtype)
                else:
                    self._write(f"{split}/{side}", shard, layout.to_bits(sides[side]), axis=1)
            if split == "train":
                self._write_stats(shard, sides, keep)
            keys = layout.shard_keys(self.manifest, split, shard)
            self.storage.fsync(keys)
            record = CommitRecord(
                split=split,
                shard=shard,
                n_contexts=n_contexts,
                n_rows=int(keep.sum()),
                largest=largest,
                n_documents=len(doc_ids.unique()),
                loss=errors,
                files={key: self.storage.written(key) for key in keys},
            )
            self.storage.publish_json(f"{MANIFEST_FOLDER}/{record.name}", record.model_dump(mode="json"))
        except OSError as error:
            raise UserError(
                f"writing shard {shard} of {split} to {self.storage} failed ({error.strerror}); free some space or "
                "fix the disk and run the same command again: committed shards are kept"
            ) from error
        self._records[split, shard] = record
        return record

    def finish(self, skipped_lines: Mapping[str, int] | None = None) -> Manifest:
        """Write the statistics, cut the arrays to what was written, and mark the set complete.

        `skipped_lines`: file -> how many broken lines of it were left out.
        Raises UserError when a split came out empty.
        """
        # From the disk, because other processes may have written some of the shards.
        self._records = {(record.split, record.shard): record for record in read_records(self.storage)}
        splits = {}
        for name, plan in self.manifest.splits.items():
            records = sorted((r for r in self._records.values() if r.split == name), key=lambda r: r.shard)
            if not records:
                raise UserError(
                    f"no text fell into the {name} split of {self.storage}: the text is too short for it. Give more "
                    "text, a smaller --ctx-len, or another harvest.val_fraction or --seed, in a new --out"
                )
            assert [r.shard for r in records] == list(range(len(records)))
            splits[name] = plan.model_copy(update={"shard_contexts": tuple(r.n_contexts for r in records)})
            if len(records) < plan.n_shards:
                self._cut(name, len(records))
        self._write_summary(splits["train"].shard_contexts)
        self.storage.fsync_metadata()
        summary = {key: self.storage.written(key) for key in layout.summary_keys(self.manifest)}
        measured = measure_codec(self.manifest, self._records.values())
        manifest = self.manifest.model_copy(
            update={
                "splits": splits,
                "summary": summary,
                "measured": measured,
                "skipped_lines": dict(skipped_lines or {}),
                "complete": True,
            }
        )
        layout.publish(self.storage, manifest)
        self.storage.fsync([ROOT_FILE])
        self.manifest = manifest
        return manifest

    def _write_ids(self, split: str, shard: int, ids: Mapping[str, Tensor]) -> None:
        for name, values in ids.items():
            self._write(f"{split}/{name}", shard, values.numpy().astype(np.int32, copy=False), axis=0)

    def _write_scaled(
        self, split: str, shard: int, side: str, values: Tensor, keep: Tensor
    ) -> tuple[Tensor, CodecError]:
        """Write one side in int8; return the values that it now has, and what was lost."""
        scaled, loss = to_scaled(values, keep)
        self._write(f"{split}/{side}", shard, scaled.q.numpy(), axis=1)
        self._write(f"{split}/{side}_channel", shard, scaled.channel.numpy())
        self._write(f"{split}/{side}_scale", shard, scaled.scale.numpy(), axis=1)
        return scaled.values(), loss

    def _write(self, name: str, shard: int, values: np.ndarray, axis: int | None = None) -> None:
        """Write one shard of an array, padded with zeros along `axis` (contexts) to the room there is."""
        array = self._array(name)
        if axis is not None and values.shape[axis] < array.shape[1 + axis]:
            room = [(0, 0)] * values.ndim
            room[axis] = (0, array.shape[1 + axis] - values.shape[axis])
            values = np.pad(values, room)
        array[shard] = values

    def _write_stats(self, shard: int, sides: Mapping[str, Tensor], keep: Tensor) -> None:
        for side, values in sides.items():
            norms, sums = row_sums(values, keep, self._norm if side == "source" else None)
            self._write(f"stats/{side}/row_norm", shard, norms.numpy(), axis=1)
            for site, found in zip((side, "normalized"), sums, strict=False):
                for name, total in zip(("shard_sum", "shard_sum_sq"), found, strict=True):
                    self._write(f"stats/{site}/{name}", shard, total.numpy())
        self._write("stats/shard_rows", shard, np.array(int(keep.sum())))

    def _write_summary(self, shard_contexts: tuple[int, ...]) -> None:
        n_shards = len(shard_contexts)
        n_rows = int(self._array("stats/shard_rows")[:n_shards].sum())
        if n_rows == 0:
            raise UserError(f"{self.storage} holds only special tokens; check the tokenizer and the dataset")
        for site in layout.stat_sites(self.manifest):
            total = self._array(f"stats/{site}/shard_sum")[:n_shards].sum(0)
            total_sq = self._array(f"stats/{site}/shard_sum_sq")[:n_shards].sum(0)
            mean = total / n_rows
            self._array(f"stats/{site}/mean")[:] = mean
            self._array(f"stats/{site}/variance")[:] = np.maximum(total_sq / n_rows - mean**2, 0)
        if self._norm is not None:
            self._array("norm/gain")[:] = self._norm.gain.float().cpu().numpy()
            if self._norm.bias is not None:
                self._array("norm/bias")[:] = self._norm.bias.float().cpu().numpy()
        for side in layout.SIDES:
            found = quantiles(lambda side=side: self._kept_norms(side, shard_contexts), NORM_QUANTILES)
            self._array(f"stats/{side}/row_norm").update_attributes(
                {"quantiles": list(NORM_QUANTILES), "values": found}
            )

    def _kept_norms(self, side: str, shard_contexts: tuple[int, ...]) -> Iterator[np.ndarray]:
        specials = np.array(self.manifest.special_ids, np.int32)
        for shard, n_contexts in enumerate(shard_contexts):
            tokens = self._array("train/tokens")[shard, :n_contexts]
            norm = self._array(f"stats/{side}/row_norm")[shard, :, :n_contexts]
            yield norm[~np.isin(tokens.T, specials)]

    def _array(self, name: str) -> Any:
        """The array `name`, for writing; typed loosely because zarr's own item types do not fit numpy's."""
        if name not in self._arrays:
            array: Any = self._root[name]
            # Not stored in the metadata, so it has to be said again: a file for every chunk, also for one of zeros.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _cut(self, split: str, n_shards: int) -> None:
        for name in layout.shard_arrays(self.manifest, split):
            array = self._array(name)
            array.resize((n_shards, *array.shape[1:]))


def check_storage(path: str | Path | Storage) -> None:
    """Raise UserError unless a shard set is at `path` or can be made there. Changes nothing, so ask it early."""
    storage = open_storage(path)
    storage.check()
    if has_manifest(storage):
        return
    # Folders named train or val are refused too: without the root's metadata they are somebody else's.
    strange = [name for name in storage.list_root() if name != MANIFEST_FOLDER and not name.endswith(".partial")]
    strange += [key for key in storage.keys(MANIFEST_FOLDER) if key.endswith(".json")]
    if strange:
        raise UserError(
            f"{storage} is not empty and not a shard set (it holds {', '.join(sorted(strange)[:5])}); choose another "
            "--out"
        )


def measure_codec(manifest: Manifest, records: Iterable[CommitRecord]) -> dict[str, float]:
    """What the codec did to the shards of `records`, as the manifest keeps it: bytes stored over those of the data.

    The padding of a shard that is not full is stored, but it is no data.
    """
    stored, raw = 0, 0
    errors: dict[str, list[CodecError]] = {}
    for record in records:
        n_tokens = manifest.ctx_len * record.n_contexts
        for side, facts in zip(layout.SIDES, (manifest.source, manifest.target), strict=True):
            raw += n_tokens * facts.width * BYTES_PER_VALUE
            names = (f"{record.split}/{side}/", f"{record.split}/{side}_")
            stored += sum(file.size for key, file in record.files.items() if key.startswith(names))
        for side, loss in record.loss.items():
            errors.setdefault(side, []).append(loss)
    measured = {"compression_ratio": stored / raw} if raw else {}
    for side, parts in errors.items():
        total = sum(part.total_sq for part in parts)
        measured[f"{side}_error"] = (sum(part.error_sq for part in parts) / total) ** 0.5 if total else 0.0
    return measured


def _grows(saved: Manifest, manifest: Manifest) -> bool:
    """Whether `manifest` asks for more tokens of what `saved` is."""
    old, new = saved.settings.get("tokens"), manifest.settings.get("tokens")
    return isinstance(old, int) and isinstance(new, int) and new > old and is_extension(saved.splits, manifest.splits)


def _identity(manifest: Manifest, grows: bool) -> dict[str, Any]:
    """What must be equal for two harvests to be the same one. The split plan follows from it and from the text."""
    later = {"versions", "summary", "measured", "skipped_lines", "complete", "splits"}
    content = manifest.model_dump(mode="json", exclude=later)
    content["dataset"] = {name: value for name, value in content["dataset"].items() if name not in FILE_FACTS}
    if grows:
        del content["settings"]["tokens"]
    return content


def _largest(values: Tensor, side: str, split: str, shard: int, weight_dtype: str | None) -> float:
    """The largest absolute value. Refuses NaN and infinity, which would poison every statistic and every training."""
    assert values.dtype == torch.bfloat16
    low, high = torch.aminmax(values)
    largest = max(abs(float(low)), abs(float(high)))
    if not np.isfinite(largest):
        n_bad = int((~torch.isfinite(values)).sum())
        wider = {"bfloat16": "Harvest with --dtype fp32", "float32": "No --dtype is wider: the model is damaged"}
        advice = wider.get(str(weight_dtype), "Harvest with --dtype bf16 or --dtype fp32")
        raise UserError(
            f"{n_bad} values of {side} are not finite in shard {shard} of {split}: the language model overflowed in "
            f"{weight_dtype or 'its dtype'}. {advice}"
        )
    return largest
