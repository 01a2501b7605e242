"""Zarr's own store class over an object store, with two things added: checksums of what is sent, and plain errors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zarr.storage import ObjectStore

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

    from matryoshka.shards.object_place import ObjectPlace

_LARGE = 2**20


def open_store(place: ObjectPlace, *, writable: bool) -> ObjectStore[Any]:
    """The objects of `place` for Zarr."""

    class PlaceStore(ObjectStore[Any]):
        """Tells `place` of each file that is written."""

        async def get(self, *args: Any, **options: Any) -> Buffer | None:
            with place.explained():
                return await super().get(*args, **options)

        async def set(self, key: str, value: Buffer) -> None:
            content = memoryview(value.as_buffer_like())
            if len(content) < _LARGE:
                place.sent(key, content)
            else:
                await asyncio.to_thread(place.sent, key, content)
            with place.explained():
                await super().set(key, value)

    return PlaceStore(place.client, read_only=not writable)
