"""The batch size that a harvest ran out of memory down to, kept beside the set until it is finished.

Not a setting and not in the manifest: it changes how fast a set is made, not what it holds.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from matryoshka.runs import FORMAT_VERSION
from matryoshka.shards.manifest import MANIFEST_FOLDER
from matryoshka.shards.place import Place

KEY = f"{MANIFEST_FOLDER}/.batch-size"


def remember(place: Place, asked: int | str, device: torch.device, found: int) -> None:
    """Say that `asked` (the setting) became `found` on this device."""
    place.publish_json(KEY, {**_question(asked, device), "batch_size": found})


def remembered(place: Place, asked: int | str, device: torch.device) -> int | None:
    """What `asked` became on such a device in an earlier try, or None."""
    try:
        content: Any = json.loads(place.read(KEY) or b"null")
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    found = content.pop("batch_size", None)
    return found if content == _question(asked, device) and isinstance(found, int) and found > 0 else None


def forget(place: Place) -> None:
    """The set is finished."""
    place.delete(KEY)


def _question(asked: int | str, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"format_version": FORMAT_VERSION, "asked": asked, "device": name}
