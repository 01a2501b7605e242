"""Writing a shard set so that it survives a kill or a power cut at any moment.

Order for each shard: its files (Zarr's LocalStore writes aside and renames), fsync of files and folders, then the
commit record, which alone makes the shard exist. `complete` in the root attributes comes after the last shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.runs import changed_fields, check_directory, fsync_path, make_directory, publish_json, refuse_changes
from matryoshka.shards import layout
from matryoshka.shards.checksum import checksum
from matryoshka.shards.manifest import (
    BYTES_PER_VALUE,
    MANIFEST_FOLDER,
    SPLITS,
    CommitRecord,
    Loss,
    Manifest,
    is_extension,
)
from matryoshka.shards.quantiles import quantiles
from matryoshka.shards.reader import ROOT_FILE, has_manifest, read_manifest, read_records
from matryoshka.shards.scaled import to_scaled
from matryoshka.sites import Norm

if TYPE_CHECKING:
    import zarr

NORM_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
_ARRAY_FOLDERS = (*SPLITS, "stats", "norm")


class ShardSetWriter:
    """The writing side of one shard set.

    One process opens and finishes it; others may join it and write other shards meanwhile. Readers wait for `finish`.
    """

    def __init__(self, path: Path, manifest: Manifest, norm: Norm | None, root: zarr.Group) -> None:
        self.path = path
        self.manifest = manifest
        self._norm = norm
        self._root = root
        self._records = {(record.split, record.shard): record for record in read_records(path)}

    @classmethod
    def open(cls, path: Path, manifest: Manifest, norm: Norm | None) -> ShardSetWriter:
        """Start a shard set at `path`, or go on with one of the same settings, or let it grow to more tokens.

        Raises UserError when `path` holds something else, or a set of other settings (the difference is named).
        """
        check_place(path)
        saved = read_manifest(path) if has_manifest(path) else None
        grows = saved is not None and _grows(saved, manifest)
        if saved is not None:
            refuse_changes(path, "harvested", changed_fields(_identity(saved, grows), _identity(manifest, grows)))
        make_directory(path / MANIFEST_FOLDER)
        for partial in path.rglob("*.partial"):  # what a killed write left behind
            partial.unlink()
        if saved is None or not read_records(path):
            # Nothing is committed: what a killed start may have left half-made is made again.
            for name in _ARRAY_FOLDERS:
                shutil.rmtree(path / name, ignore_errors=True)
            (path / ROOT_FILE).unlink(missing_ok=True)
            layout.create_arrays(path, manifest)
            _fsync_tree(path)
            saved = manifest
        elif saved.complete or grows:
            # A shard is to be rewritten or added; until the statistics follow, the set must not pass for whole.
            planned = {"splits": manifest.splits, "settings": manifest.settings} if grows else {}
            saved = saved.model_copy(update={"summary": {}, "measured": {}, "complete": False, **planned})
            layout.publish(path, saved)
            fsync_path(path / ROOT_FILE)
        root = layout.open_root(path, writable=True)
        layout.fit_arrays(root, saved)
        return cls(path, saved, norm, root)

    @classmethod
    def join(cls, path: Path, manifest: Manifest, norm: Norm | None) -> ShardSetWriter:
        """Write shards of a set that another process has opened and will finish. Raises UserError as `open` does."""
        saved = read_manifest(path)
        refuse_changes(path, "harvested", changed_fields(_identity(saved, False), _identity(manifest, False)))
        return cls(path, saved, norm, layout.open_root(path, writable=True))

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
        n_contexts = self._records[split, shard].n_contexts
        for name, ids in (("tokens", tokens), ("doc_ids", doc_ids)):
            if not np.array_equal(_array(self._root, f"{split}/{name}")[shard, :n_contexts], ids.numpy()):
                raise UserError(
                    f"the text of {self.manifest.dataset.get('name')} is not what it was when shard {shard} of {split} "
                    f"of {self.path} was written. Restore the text (or pin its revision), or harvest into a new --out"
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
        for side, values in sides.items():
            _refuse_nonfinite(values, side, split, shard)
        keep = ~torch.isin(tokens.T, torch.tensor(self.manifest.special_ids, dtype=tokens.dtype))
        try:
            self._write_ids(split, shard, {"tokens": tokens, "doc_ids": doc_ids})
            losses: dict[str, Loss] = {}
            for side in sides:
                if layout.is_scaled(self.manifest):
                    # Statistics are of what a reader will get.
                    sides[side], losses[side] = self._write_scaled(split, shard, side, sides[side], keep)
                else:
                    self._write(f"{split}/{side}", shard, layout.to_bits(sides[side]), axis=1)
            if split == "train":
                self._write_stats(shard, sides, keep)
            files = {}
            for key in layout.shard_keys(self.manifest, split, shard):
                fsync_path(self.path / key)
                files[key] = checksum(self.path / key)
            _fsync_folders(self.path, files)
            record = CommitRecord(
                split=split,
                shard=shard,
                n_contexts=n_contexts,
                n_rows=int(keep.sum()),
                largest={side: float(values.abs().max()) for side, values in sides.items()},
                n_documents=len(doc_ids.unique()),
                loss=losses,
                files=files,
            )
            publish_json(self.path / MANIFEST_FOLDER / record.name, record.model_dump(mode="json"))
        except OSError as error:
            raise UserError(
                f"writing shard {shard} of {split} to {self.path} failed ({error.strerror}); free some space or mend "
                "the disk and run the same command again: committed shards are kept"
            ) from error
        self._records[split, shard] = record
        return record

    def finish(self) -> Manifest:
        """Write the statistics, cut the arrays to what was written, and mark the set complete.

        Raises UserError when a split came out empty.
        """
        # From the disk, because other processes may have written some of the shards.
        self._records = {(record.split, record.shard): record for record in read_records(self.path)}
        splits = {}
        for name, plan in self.manifest.splits.items():
            records = sorted((r for r in self._records.values() if r.split == name), key=lambda r: r.shard)
            if not records:
                raise UserError(
                    f"no text fell into the {name} split of {self.path}: the text is too short for it. Give more "
                    "text, a smaller --ctx-len, or another harvest.val_fraction or --seed, in a new --out"
                )
            assert [r.shard for r in records] == list(range(len(records)))
            splits[name] = plan.model_copy(update={"shard_contexts": tuple(r.n_contexts for r in records)})
            if len(records) < plan.n_shards:
                self._cut(name, len(records))
        self._write_summary(splits["train"].shard_contexts)
        _fsync_tree(self.path)
        summary = {key: checksum(self.path / key) for key in layout.summary_keys(self.manifest)}
        measured = measure_codec(self.manifest, self._records.values())
        manifest = self.manifest.model_copy(
            update={"splits": splits, "summary": summary, "measured": measured, "complete": True}
        )
        layout.publish(self.path, manifest)
        fsync_path(self.path / ROOT_FILE)
        fsync_path(self.path)
        self.manifest = manifest
        return manifest

    def _write_ids(self, split: str, shard: int, ids: Mapping[str, Tensor]) -> None:
        for name, values in ids.items():
            self._write(f"{split}/{name}", shard, values.numpy().astype(np.int32, copy=False), axis=0)

    def _write_scaled(self, split: str, shard: int, side: str, values: Tensor, keep: Tensor) -> tuple[Tensor, Loss]:
        """Write one side in int8; return the values that it now has, and what was lost."""
        scaled, loss = to_scaled(values, keep)
        self._write(f"{split}/{side}", shard, scaled.q.numpy(), axis=1)
        self._write(f"{split}/{side}_channel", shard, scaled.channel.numpy())
        self._write(f"{split}/{side}_scale", shard, scaled.scale.numpy(), axis=1)
        return scaled.values(), loss

    def _write(self, name: str, shard: int, values: np.ndarray, axis: int | None = None) -> None:
        """Write one shard of an array, padded with zeros along `axis` (contexts) to the room there is."""
        array = _array(self._root, name)
        if axis is not None and values.shape[axis] < array.shape[1 + axis]:
            room = [(0, 0)] * values.ndim
            room[axis] = (0, array.shape[1 + axis] - values.shape[axis])
            values = np.pad(values, room)
        array[shard] = values

    def _write_stats(self, shard: int, sides: Mapping[str, Tensor], keep: Tensor) -> None:
        """Float64 sums over non-special rows; position by position, so that memory stays small."""
        plan = self.manifest.splits["train"]
        sums = {
            site: torch.zeros(2, width, dtype=torch.float64) for site, width in layout.stat_sites(self.manifest).items()
        }
        norms = {side: np.zeros((self.manifest.ctx_len, plan.contexts), np.float32) for side in sides}
        for position, rows in enumerate(keep):
            for side, values in sides.items():
                here = values[position].float()
                norms[side][position, : len(here)] = here.norm(dim=1).numpy()
                _accumulate(sums[side], here[rows])
                if side == "source" and self._norm is not None:
                    _accumulate(sums["normalized"], self._norm.normalized(here[rows]))
        for site, (total, total_sq) in sums.items():
            _array(self._root, f"stats/{site}/shard_sum")[shard] = total.numpy()
            _array(self._root, f"stats/{site}/shard_sum_sq")[shard] = total_sq.numpy()
        for side, norm in norms.items():
            _array(self._root, f"stats/{side}/row_norm")[shard] = norm
        _array(self._root, "stats/shard_rows")[shard] = int(keep.sum())

    def _write_summary(self, shard_contexts: tuple[int, ...]) -> None:
        n_shards = len(shard_contexts)
        n_rows = int(_array(self._root, "stats/shard_rows")[:n_shards].sum())
        if n_rows == 0:
            raise UserError(f"{self.path} holds only special tokens; check the tokenizer and the dataset")
        for site in layout.stat_sites(self.manifest):
            total = _array(self._root, f"stats/{site}/shard_sum")[:n_shards].sum(0)
            total_sq = _array(self._root, f"stats/{site}/shard_sum_sq")[:n_shards].sum(0)
            mean = total / n_rows
            _array(self._root, f"stats/{site}/mean")[:] = mean
            _array(self._root, f"stats/{site}/variance")[:] = np.maximum(total_sq / n_rows - mean**2, 0)
        if self._norm is not None:
            _array(self._root, "norm/gain")[:] = self._norm.gain.float().cpu().numpy()
            if self._norm.bias is not None:
                _array(self._root, "norm/bias")[:] = self._norm.bias.float().cpu().numpy()
        for side in layout.SIDES:
            found = quantiles(lambda side=side: self._kept_norms(side, shard_contexts), NORM_QUANTILES)
            _array(self._root, f"stats/{side}/row_norm").update_attributes(
                {"quantiles": list(NORM_QUANTILES), "values": found}
            )

    def _kept_norms(self, side: str, shard_contexts: tuple[int, ...]) -> Iterator[np.ndarray]:
        specials = np.array(self.manifest.special_ids, np.int32)
        for shard, n_contexts in enumerate(shard_contexts):
            tokens = _array(self._root, "train/tokens")[shard, :n_contexts]
            norm = _array(self._root, f"stats/{side}/row_norm")[shard, :, :n_contexts]
            yield norm[~np.isin(tokens.T, specials)]

    def _cut(self, split: str, n_shards: int) -> None:
        for name in layout.shard_arrays(self.manifest, split):
            array = _array(self._root, name)
            array.resize((n_shards, *array.shape[1:]))


def check_place(path: Path) -> None:
    """Raise UserError unless a shard set is at `path` or can be made there. Changes nothing, so ask it early."""
    check_directory(path)
    if has_manifest(path) or not path.is_dir():
        return
    # Folders named train or val are refused too: without the root's metadata they are somebody else's.
    strange = [entry.name for entry in path.iterdir() if entry.name != MANIFEST_FOLDER and entry.suffix != ".partial"]
    strange += [f"{MANIFEST_FOLDER}/{file.name}" for file in (path / MANIFEST_FOLDER).glob("*.json")]
    if strange:
        raise UserError(
            f"{path} is not empty and not a shard set (it holds {', '.join(sorted(strange)[:5])}); choose another --out"
        )


def measure_codec(manifest: Manifest, records: Iterable[CommitRecord]) -> dict[str, float]:
    """What the codec did to the shards of `records`, as the manifest keeps it; raw bfloat16 counts room for padding."""
    stored, raw = 0, 0
    losses: dict[str, list[Loss]] = {}
    for record in records:
        room = manifest.ctx_len * manifest.splits[record.split].contexts
        for side, facts in zip(layout.SIDES, (manifest.source, manifest.target), strict=True):
            raw += room * facts.width * BYTES_PER_VALUE
            names = (f"{record.split}/{side}/", f"{record.split}/{side}_")
            stored += sum(file.size for key, file in record.files.items() if key.startswith(names))
        for side, loss in record.loss.items():
            losses.setdefault(side, []).append(loss)
    measured = {"compression_ratio": stored / raw} if raw else {}
    for side, parts in losses.items():
        total = sum(part.total_sq for part in parts)
        measured[f"{side}_error"] = (sum(part.error_sq for part in parts) / total) ** 0.5 if total else 0.0
    return measured


def _grows(saved: Manifest, manifest: Manifest) -> bool:
    """Whether `manifest` asks for more tokens of what `saved` is."""
    old, new = saved.settings.get("tokens"), manifest.settings.get("tokens")
    return isinstance(old, int) and isinstance(new, int) and new > old and is_extension(saved.splits, manifest.splits)


def _identity(manifest: Manifest, grows: bool) -> dict[str, Any]:
    """What must be equal for two harvests to be the same one. The split plan follows from it and from the text."""
    content = manifest.model_dump(mode="json", exclude={"versions", "summary", "measured", "complete", "splits"})
    if grows:
        del content["settings"]["tokens"]
    return content


def _array(root: zarr.Group, name: str) -> Any:
    """The array `name`, for writing; typed loosely because zarr's own item types do not fit numpy's."""
    array: Any = root[name]
    # Not stored in the metadata, so it has to be said again: a file for every chunk, also for one of zeros.
    return array.with_config({"write_empty_chunks": True})


def _accumulate(sums: Tensor, rows: Tensor) -> None:
    rows = rows.double()
    sums[0] += rows.sum(0)
    sums[1] += rows.square().sum(0)


def _refuse_nonfinite(values: Tensor, side: str, split: str, shard: int) -> None:
    """Refuses NaN and infinity, which would poison every statistic and every training run."""
    assert values.dtype == torch.bfloat16
    if not np.isfinite(float(values.abs().max())):
        n_bad = int((~torch.isfinite(values)).sum())
        raise UserError(
            f"{n_bad} values of {side} are not finite in shard {shard} of {split}: the language model overflowed. "
            "Harvest with --dtype bf16 or --dtype fp32"
        )


def _fsync_folders(root: Path, keys: Mapping[str, object]) -> None:
    """Every folder between the files and the root: a new file is only safe once the names above it are."""
    folders = {parent for key in keys for parent in (root / key).parents if parent.is_relative_to(root)}
    for folder in folders:
        fsync_path(folder)


def _fsync_tree(root: Path) -> None:
    """Metadata and small arrays: everything but the shards themselves, which are synced as they are committed."""
    for path in root.rglob("zarr.json"):
        fsync_path(path)
    for folder in ("stats", "norm"):
        for path in (root / folder).rglob("*"):
            if path.is_file():
                fsync_path(path)
    for path in (root, *(p for p in root.iterdir() if p.is_dir())):
        fsync_path(path)
