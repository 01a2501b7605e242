"""The identity of a model: a digest of its weight files, whatever the folder is called.

It is of the files, not of what was loaded, so that it is the same for every dtype, device and library version, and can
be had without loading anything. It covers each tensor's name, dtype, shape and bytes; of a tensor above 256 KiB the
bytes of 64 spans of 4 KiB, evenly spaced from the first to the last. So it reads 100 MB of a model of 50 GB (a sha256
of everything would read it all again, at 1.5 GB/s, each time a latent is looked at), and still notices what changes a
tensor as a whole, as training, merging, quantising and another seed do, in a single tensor too. An edit of a few rows
of a large matrix may pass; whoever runs a model on a shard set also holds stored activations against it.
How tensors are spread over files does not matter.

config.json decides activations too (the norm's eps, rotary frequencies), and has a digest of its own, so that sets of
before it stay what they are.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from matryoshka.config import digest
from matryoshka.errors import UserError
from matryoshka.lm.failures import cannot_load

_WHOLE_BYTES = 2**18
_SPANS = 64
_SPAN_BYTES = 2**12
_SAYS_NOTHING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Keys of config.json that saving a model again may change. What dtype it is loaded in is a setting."""
_LARGEST_HEADER = 100_000_000  # what the safetensors library itself takes


def weights_digest(name_or_path: str, revision: str | None = None) -> str:
    """The sha256, in hex, of the weights of a model of the hub or in a folder.

    Raises:
        UserError: it has no safetensors files, or one of them is damaged.
    """
    tensors: dict[str, bytes] = {}
    for file in _weight_files(str(name_or_path), revision):
        try:
            with file.open("rb") as stream:
                tensors.update(_tensors(stream))
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise cannot_load(name_or_path, revision, "weights", error) from error
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name])
    return whole.hexdigest()


def config_digest(name_or_path: str, revision: str | None = None) -> str:
    """The sha256, in hex, of what config.json says of a model of the hub or in a folder, in whatever order.

    Raises UserError where there is none, or it is no JSON.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name_or_path, "config.json", revision=revision)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise cannot_load(name_or_path, revision, "config.json", error) from error
    return digest(_deciding(content))


def differs(known: Mapping[str, Any], weights: str, config: str) -> str | None:
    """What of a model is not as the digests in `known` say: "weights", "settings (config.json)" or None.

    `known` is what a manifest says of its model; those of earlier versions know the weights alone, or nothing.
    """
    for what, name, found in (
        ("weights", "weights_digest", weights),
        ("settings (config.json)", "config_digest", config),
    ):
        if known.get(name) not in (None, found):
            return what
    return None


def _deciding(content: Any) -> Any:
    """`content` without the keys that say nothing of activations, at any depth."""
    if isinstance(content, dict):
        return {key: _deciding(value) for key, value in content.items() if key not in _SAYS_NOTHING}
    return [_deciding(item) for item in content] if isinstance(content, list) else content


def _weight_files(name: str, revision: str | None) -> list[Path]:
    from transformers.utils.hub import cached_file

    where: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        index = cached_file(name, "model.safetensors.index.json", **where)
        if index is None:
            files = {"model.safetensors"}
        else:
            files = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        found = [cached_file(name, file, **where) for file in sorted(files)]
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(name, revision, "weights", error) from error
    if None in found:
        raise UserError(f"{name} has no file {sorted(files)[found.index(None)]}, of which its identity is made.")
    return [Path(str(path)) for path in found]


def _tensors(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(name, sha256 of its name, dtype, shape and bytes) of each tensor of a safetensors file."""
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > _LARGEST_HEADER:
        raise ValueError("its header is too long for a safetensors file")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, facts in header.items():
        begin, end = facts["data_offsets"]
        found = hashlib.sha256(json.dumps([name, facts["dtype"], facts["shape"]]).encode())
        for start, stop in _spans(end - begin):
            stream.seek(8 + length + begin + start)
            piece = stream.read(stop - start)
            if len(piece) != stop - start:
                raise ValueError(f"the file ends inside the tensor {name}")
            found.update(piece)
        yield name, found.digest()


def _spans(n_bytes: int) -> Iterator[tuple[int, int]]:
    """The parts of a tensor of `n_bytes` that are read."""
    if n_bytes <= _WHOLE_BYTES:
        yield 0, n_bytes
        return
    for i in range(_SPANS):
        start = (n_bytes - _SPAN_BYTES) * i // (_SPANS - 1)
        yield start, start + _SPAN_BYTES
