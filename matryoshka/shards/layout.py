"""Arrays of a shard set: names, shapes, chunks, codecs, and the bfloat16 bit view."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.shards.manifest import Manifest, SplitPlan
from matryoshka.shards.storage import Storage

if TYPE_CHECKING:
    import zarr

SIDES = ("source", "target")
CODECS = ("compact", "raw", "int8")
RATIO = {"compact": 0.70, "raw": 1.0, "int8": 0.505}
"""Expected size over raw bfloat16, for estimates (storage.md section 2: compact 1.43x)."""
BIT_VIEW = {"logical_dtype": "bfloat16", "encoding": "bit-view"}
"""Attributes of an array that holds bfloat16 bits as uint16: Zarr v3 core has no bfloat16."""
SCALED = {"logical_dtype": "bfloat16", "encoding": "int8 * channel * scale"}
"""Attributes of an int8 array; the factors are beside it in <side>_channel and <side>_scale."""


def open_root(storage: Storage, *, writable: bool, finished: bool = True) -> zarr.Group:
    """The Zarr group at `storage`, which must exist. `finished` says whether the set is."""
    import zarr

    # A writer changes arrays, which the copy of their metadata in the root's does not follow until the end.
    use_consolidated = False if writable or not finished else None
    return zarr.open_group(
        storage.store(writable=writable),
        mode="r+" if writable else "r",
        zarr_format=3,
        use_consolidated=use_consolidated,
    )


def create_arrays(storage: Storage, manifest: Manifest) -> zarr.Group:
    """Make the root group and all arrays at their full planned size. The root attributes are the manifest."""
    import zarr

    attributes = manifest.model_dump(mode="json")
    root = zarr.create_group(storage.store(writable=True), zarr_format=3, attributes=attributes)
    for name, plan in manifest.splits.items():
        _create_split(root, name, plan, manifest)
    _create_stats(root, manifest)
    return root


def publish(storage: Storage, manifest: Manifest) -> None:
    """Put the metadata of all arrays into the root's, and then, in one atomic write, the final manifest.

    With the copy, opening takes one read, and manifest/ is not taken for data.
    """
    import zarr
    from zarr.errors import ZarrUserWarning

    with warnings.catch_warnings():
        # Readers that do not know it ignore it, so that it is not in the v3 core specification does no harm.
        warnings.simplefilter("ignore", ZarrUserWarning)
        root = zarr.consolidate_metadata(storage.store(writable=True), zarr_format=3)
    root.update_attributes(manifest.model_dump(mode="json"))


def _create_split(root: zarr.Group, name: str, plan: SplitPlan, manifest: Manifest) -> None:
    from zarr.codecs import ZstdCodec

    ids = (plan.contexts, manifest.ctx_len)
    for array in ("tokens", "doc_ids"):
        _create(root, f"{name}/{array}", (plan.n_shards, *ids), (1, *ids), "int32", [ZstdCodec(level=3)])
    for side, facts in zip(SIDES, (manifest.source, manifest.target), strict=True):
        shard = (manifest.ctx_len, plan.contexts, facts.width)
        if is_scaled(manifest):
            for array, dims in _factors(side, manifest.ctx_len, plan.contexts, facts.width).items():
                _create(root, f"{name}/{array}", (plan.n_shards, *dims), (1, *dims), "float32", None)
        root.create_array(
            f"{name}/{side}",
            shape=(plan.n_shards, *shard),
            shards=(1, *shard),
            chunks=(1, plan.chunk_positions, plan.contexts, facts.width),
            dtype="int8" if is_scaled(manifest) else "uint16",
            compressors=_compressors(manifest.codec),
            fill_value=0,
            attributes={
                **(SCALED if is_scaled(manifest) else BIT_VIEW),
                "site": facts.site,
                "layer": facts.layer,
                "hook_point": facts.hook_point,
            },
            # The emptiness test per chunk costs four fifths of the write rate, and a raw shard
            # without holes can be mapped into memory.
            config={"write_empty_chunks": True},
        )


def fit_arrays(root: zarr.Group, manifest: Manifest) -> None:
    """Give every array that is too short its planned number of shards: the plan of a set may have grown."""
    for split, plan in manifest.splits.items():
        for name in shard_arrays(manifest, split):
            array: Any = root[name]
            if array.shape[0] < plan.n_shards:
                array.resize((plan.n_shards, *array.shape[1:]))


def _create_stats(root: zarr.Group, manifest: Manifest) -> None:
    plan = manifest.splits["train"]
    rows = (manifest.ctx_len, plan.contexts)
    _create(root, "stats/shard_rows", (plan.n_shards,), (1,), "int64", None)
    for site, width in stat_sites(manifest).items():
        for name in ("shard_sum", "shard_sum_sq"):
            _create(root, f"stats/{site}/{name}", (plan.n_shards, width), (1, width), "float64", None)
        for name in ("mean", "variance"):
            _create(root, f"stats/{site}/{name}", (width,), (width,), "float64", None)
    for side in SIDES:
        _create(root, f"stats/{side}/row_norm", (plan.n_shards, *rows), (1, *rows), "float32", None)
    if manifest.norm is not None:
        width = manifest.source.width
        for name in ("gain", "bias") if manifest.norm.has_bias else ("gain",):
            _create(root, f"norm/{name}", (width,), (width,), "float32", None)


def is_scaled(manifest: Manifest) -> bool:
    """Whether the activations are int8 with factors beside them, not bfloat16 bits."""
    return manifest.codec == "int8"


def _factors(side: str, ctx_len: int, contexts: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{side}_channel": (width,), f"{side}_scale": (ctx_len, contexts)}


def stat_sites(manifest: Manifest) -> dict[str, int]:
    """What stats/ keeps means and variances of, with widths. `normalized` is the source after its norm, no gain."""
    sites = {"source": manifest.source.width, "target": manifest.target.width}
    if manifest.norm is not None:
        sites["normalized"] = manifest.source.width
    return sites


def shard_arrays(manifest: Manifest, split: str) -> dict[str, int]:
    """The arrays of a split that have one file in each shard, with their number of dimensions."""
    arrays = {f"{split}/tokens": 3, f"{split}/doc_ids": 3, f"{split}/source": 4, f"{split}/target": 4}
    if is_scaled(manifest):
        arrays |= {f"{split}/{side}_{name}": ndim for side in SIDES for name, ndim in (("channel", 2), ("scale", 3))}
    if split == "train":
        arrays["stats/shard_rows"] = 1
        arrays |= {f"stats/{site}/{name}": 2 for site in stat_sites(manifest) for name in ("shard_sum", "shard_sum_sq")}
        arrays |= {f"stats/{side}/row_norm": 3 for side in SIDES}
    return arrays


def shard_keys(manifest: Manifest, split: str, shard: int) -> list[str]:
    """Keys (paths below the root) of all files that belong to one shard."""
    return [f"{name}/c/{shard}{'/0' * (ndim - 1)}" for name, ndim in shard_arrays(manifest, split).items()]


def summary_keys(manifest: Manifest) -> list[str]:
    """Keys of the files of stats/ and norm/ that belong to no shard."""
    keys = [f"stats/{site}/{name}/c/0" for site in stat_sites(manifest) for name in ("mean", "variance")]
    if manifest.norm is not None:
        keys += [f"norm/{name}/c/0" for name in (("gain", "bias") if manifest.norm.has_bias else ("gain",))]
    return keys


def to_bits(values: Tensor) -> np.ndarray:
    """bfloat16 tensor -> uint16 array of the same bits, without a copy."""
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: np.ndarray) -> Tensor:
    """uint16 array -> bfloat16 tensor of the same bits, without a copy."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def _compressors(codec: str) -> Any:
    from zarr.codecs import BloscCodec

    if codec in ("raw", "int8"):
        return None
    if codec == "compact":
        # The block size is essential: with blosc's own, each zstd block mixes high and low bytes and the ratio falls
        # from 1.43 to 1.26 at a third of the speed.
        return [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2, blocksize=512 * 1024)]
    raise UserError(f"unknown codec {codec!r}; there are {', '.join(CODECS)}")


def _create(
    root: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, compressors: Any
) -> None:
    root.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=compressors,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
