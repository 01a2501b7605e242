"""A fleet: several runs from one stream. From the settings `fleet` and `grid` to one TrainConfig for each member."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from matryoshka.config import explain, overlaid, unknown_key
from matryoshka.errors import UserError
from matryoshka.locations import location_name
from matryoshka.runs import default_run_path

from .config import TrainConfig

STREAM_SETTINGS = ("shards", "order_seed", "batch_tokens", "buffer_tokens", "max_norm", "calibration_tokens")
"""What decides the batches. All members of a fleet are trained on the same ones."""
_COMMAND_SETTINGS = ("out", "fleet", "grid", "parallel", "readers", "device")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """One run to train: its name, its settings, and where it is."""

    name: str
    config: TrainConfig
    folder: Path


def fleet_folder(config: TrainConfig) -> Path:
    """The folder of a fleet, which holds the run directories of its members."""
    if config.out is not None:
        return config.out
    assert config.shards is not None
    return default_run_path(config.shards, config.k).with_name(f"{location_name(config.shards)}-fleet")


def is_fleet(config: TrainConfig) -> bool:
    """Whether the settings describe several runs."""
    return config.fleet is not None or config.grid is not None


def members(config: TrainConfig) -> list[MemberConfig]:
    """The runs that the settings describe; a plain run is a fleet of one.

    `fleet` is a list of overrides and `grid` maps settings to lists of values; with both, every entry of `fleet` is
    taken at every point of the grid. Raises UserError on unknown or shared settings, bad values and equal names.
    """
    assert config.shards is not None
    if not is_fleet(config):
        folder = config.out if config.out is not None else default_run_path(config.shards, config.k)
        return [MemberConfig(folder.name, config, folder)]
    folder = fleet_folder(config)
    found: dict[str, MemberConfig] = {}
    for entry in config.fleet if config.fleet is not None else ({},):
        for point in _points(config.grid or {}):
            member = _member(config, folder, entry, point)
            if member.name in found:
                raise UserError(
                    f"two members of the fleet are called {member.name}; give each entry of train.fleet its own name"
                )
            found[member.name] = member
    if not found:
        raise UserError("train.fleet and train.grid describe no run; give at least one entry, and values for each key")
    return list(found.values())


def _points(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _member(config: TrainConfig, folder: Path, entry: Mapping[str, Any], point: Mapping[str, Any]) -> MemberConfig:
    changes = {key: value for key, value in entry.items() if key != "name"}
    twice = sorted(changes.keys() & point.keys())
    if twice:
        raise UserError(f"train.fleet and train.grid both set {', '.join(twice)}; keep one of the two")
    parts = [str(entry["name"])] if "name" in entry else [_label(key, value) for key, value in changes.items()]
    parts += [_label(key, value) for key, value in point.items()]
    name = "-".join(parts) or "base"
    if _NAME.fullmatch(name) is None:
        raise UserError(
            f"{name!r} cannot name a folder; give that entry of train.fleet a name of letters, digits and . _ + = -"
        )
    changes |= point
    _check_keys(name, changes)
    values = overlaid(TrainConfig, config.model_dump(exclude={"fleet", "grid"}), changes) | {"out": folder / name}
    try:
        return MemberConfig(name, TrainConfig.model_validate(values), folder / name)
    except ValidationError as error:
        raise UserError(f"bad settings of the fleet's member {name}: {explain(error, TrainConfig)}") from error


def _check_keys(name: str, changes: Mapping[str, Any]) -> None:
    shared = [key for key in changes if key in STREAM_SETTINGS]
    if shared:
        raise UserError(
            f"the fleet's member {name} sets {', '.join(shared)}, but all members are trained on the same batches of "
            f"one stream, which {', '.join(STREAM_SETTINGS)} decide. Set it for the whole fleet, or train another fleet"
        )
    command = [key for key in changes if key in _COMMAND_SETTINGS]
    if command:
        raise UserError(
            f"the fleet's member {name} sets {', '.join(command)}, which belongs to the whole command; set it beside "
            "train.fleet"
        )
    unknown = [key for key in changes if key not in TrainConfig.model_fields]
    gone = [f"{key}: {unknown_key(TrainConfig, key)}" for key in unknown if key in TrainConfig.GONE]
    if gone:
        raise UserError(f"bad settings of the fleet's member {name}: {'; '.join(gone)}")
    if unknown:
        own = [key for key in TrainConfig.model_fields if key not in (*STREAM_SETTINGS, *_COMMAND_SETTINGS)]
        raise UserError(
            f"the fleet's member {name} has the unknown key {', '.join(unknown)}; known keys: name, {', '.join(own)}"
        )


def _label(key: str, value: object) -> str:
    """`lr=0.003`, `group_sizes=8+16+24`: a part of a folder's name."""
    text = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"{key}={text.replace(',', '+')}"
