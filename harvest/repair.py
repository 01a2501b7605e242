"""`harvest verify`: check a shard set, and harvest again what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from matryoshka.config import explain
from matryoshka.errors import UserError
from matryoshka.shards.records import read_manifest
from matryoshka.shards.storage_open import open_storage
from matryoshka.shards.verify import Verdict, discard, verify

from .config import HarvestConfig, recorded_settings
from .estimate import gigabytes
from .run import harvest
from .same_model import check_model


def verify_and_repair(
    path: Path | str, operational: Mapping[str, Any], *, repair: bool, say: Callable[[str], None]
) -> bool:
    """Whether the set at `path` is whole, after a repair if one was asked for. `say` gets a line for each finding.

    A repair is a harvest with the settings that the manifest records (with batch_size and device from `operational`),
    so it needs the model and the text where they were.
    """
    verdict = verify(path)
    _report(path, verdict, say)
    if verdict.is_whole or not repair:
        return verdict.is_whole
    config = recorded_config(path, operational)
    storage = open_storage(path)
    saved = read_manifest(storage)
    check_model(saved, path, config.model, config.revision)  # before anything is thrown away
    with storage.exclusive():
        discard(storage, verdict)
    for result in harvest(config):
        say(f"{result.path}: {result.n_shards_written} shards harvested again")
    verdict = verify(path)
    _report(path, verdict, say)
    return verdict.is_whole


def recorded_config(path: Path | str, operational: Mapping[str, Any]) -> HarvestConfig:
    """The settings with which the set at `path` was harvested."""
    manifest = read_manifest(path)
    settings = {
        **recorded_settings(manifest.settings),
        "val_unit": manifest.val_unit,
        "skip_bad_lines": bool(manifest.skipped_lines),
    }
    try:
        return HarvestConfig.model_validate({**settings, **operational, "out": path})
    except ValidationError as error:
        raise UserError(f"the settings in the manifest of {path} cannot be used: {explain(error)}") from error


def _report(path: Path | str, verdict: Verdict, say: Callable[[str], None]) -> None:
    for damage in verdict.damage:
        say(f"{path}: {damage}")
    for name in verdict.metadata:
        say(f"{path}: the metadata {name}/zarr.json is not what the set was finished with")
    read = f"{verdict.n_committed} of {verdict.n_planned} shards, {gigabytes(verdict.n_bytes)} read"
    if not verdict.is_whole:
        bad = {(damage.split, damage.shard) for damage in verdict.damage}
        say(f"{path}: {len(bad)} bad shards ({read})")
    elif verdict.complete:
        say(f"{path}: whole ({read})")
    else:
        say(f"{path}: what is there is whole, but the set is unfinished ({read}); run its harvest command again")
