"""`evaluate hierarchy`: one pass over the rows, then which latents fire together, and what each group adds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.metrics import FiringCounts
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from ..active import active_latents
from ..analysis import Progress, Silent, load_transcoder
from ..checkpoint import Checkpoint, find_checkpoint
from ..config import EvaluateConfig
from ..result import ShardSetFacts, TranscoderFacts, already_answered, finite, identity_of, result_folder
from ..resume import Unfinished, unfinished
from ..rows import count_rows, input_and_target, row_batches
from .clusters import Clusters, check_libraries, cluster_directions
from .cofiring import Cofiring, cofiring, edge_cosines
from .directions import mean_abs_cosines
from .fires import FireLog
from .gains import GainSums
from .hierarchy_file import (
    HIERARCHY_FILE,
    IMPLIED,
    ClusterSummary,
    GroupPair,
    Hierarchy,
    read_hierarchy,
    write_clusters,
    write_cofiring,
    write_edges,
    write_hierarchy,
)
from .pair_sums import pair_counts


@dataclass(frozen=True, slots=True)
class Structured:
    """A hierarchy.json and how it came about."""

    path: Path
    hierarchy: Hierarchy
    is_new: bool
    """False when it was there already."""
    replaced: tuple[str, ...] = ()
    """How an older one in the same place differed."""
    n_resumed: int = 0
    """Rows that an earlier command, which was stopped, had done already."""


class _Pass:
    """Everything that the pass sums up."""

    SUMS = ("n_rows", "gains", "firing", "fires")

    def __init__(self, transcoder: Transcoder, shards: ShardSet, fires: FireLog) -> None:
        self.n_rows = 0
        self.gains = GainSums(shards, transcoder.config.group_sizes)
        self.firing = FiringCounts(transcoder.config.d_sae)
        self.fires = fires


def make_hierarchy(run: Path, config: EvaluateConfig, progress: Progress | None = None) -> Structured:
    """Measure how the latents of `run` relate on the rows of `config.shards`, and publish it beside its report.

    What already answers for the same weights, rows and settings is only read; a pass that was stopped goes on from its
    last saved state. Raises UserError for whatever the user can mend.
    """
    progress = progress or Silent()
    if config.shards is None:
        raise UserError("no shard set was named; pass --shards, for example --shards data/l17")
    if config.hierarchy.clusters:
        check_libraries()
    shards, checkpoint = ShardSet.open(config.shards), find_checkpoint(run)
    if count_rows(shards, config.split) == 0:
        raise UserError(f"the {config.split} split of {shards.path} holds only special tokens; harvest more text")
    transcoder = load_transcoder(checkpoint, shards, config)
    folder = result_folder(checkpoint, shards, config)
    identity = identity_of(checkpoint, shards, _settings(config))
    existing, changes = already_answered(read_hierarchy(folder), identity)
    if existing is not None:
        return Structured(folder / HIERARCHY_FILE, existing, is_new=False)
    with unfinished(folder / HIERARCHY_FILE, identity, config.save_minutes) as saved:
        transcoder = transcoder.to(resolve_device(config.device))
        sums = _pass(transcoder, checkpoint.name, shards, config, progress, saved)
        counts, sizes = sums.firing.counts, transcoder.config.group_sizes
        blocks = pair_counts(sums.fires, transcoder.config.d_sae, transcoder.device)
        found = cofiring(blocks, counts, sums.n_rows, sizes, config.hierarchy)
        write_edges(folder, found.edges, edge_cosines(transcoder.W_dec, found.edges), counts, sums.n_rows, sizes)
        write_cofiring(folder, found.partners, counts)
        clusters = _clusters(transcoder, counts, config)
        if clusters is not None:
            write_clusters(folder, counts.nonzero().squeeze(1), clusters)
        hierarchy = _hierarchy(transcoder, checkpoint, shards, config, sums, found, clusters)
        path = write_hierarchy(folder, hierarchy)
    return Structured(path, hierarchy, is_new=True, replaced=changes, n_resumed=saved.n_resumed)


def _pass(
    transcoder: Transcoder,
    name: str,
    shards: ShardSet,
    config: EvaluateConfig,
    progress: Progress,
    saved: Unfinished,
) -> _Pass:
    sums = _Pass(transcoder, shards, FireLog(saved.folder))
    n_rows = count_rows(shards, config.split, config.tokens)
    progress.started(name, n_rows)
    n_done = saved.load(sums)
    progress.advanced(n_done)
    for batch in row_batches(shards.split(config.split), config.batch_rows, config.tokens, n_done):
        x, y = input_and_target(transcoder, shards, batch)
        active = active_latents(transcoder, x)
        sums.gains.add(transcoder, batch, x, y, active)
        sums.firing.add_active(active.latent.cpu(), active.n_rows)
        sums.fires.add(active)
        sums.n_rows += len(batch)
        progress.advanced(len(batch))
        saved.save_when_due(sums, sums.n_rows)
    assert sums.n_rows == n_rows
    # What follows takes a while too.
    saved.save(sums, n_rows)
    return sums


def _clusters(transcoder: Transcoder, counts: Tensor, config: EvaluateConfig) -> Clusters | None:
    settings = config.hierarchy
    if not settings.clusters:
        return None
    alive = (counts > 0).to(transcoder.device)
    return cluster_directions(
        transcoder.W_dec[alive], settings.neighbours, settings.min_cluster_size, config.seed, transcoder.device
    )


def _hierarchy(
    transcoder: Transcoder,
    checkpoint: Checkpoint,
    shards: ShardSet,
    config: EvaluateConfig,
    sums: _Pass,
    found: Cofiring,
    clusters: Clusters | None,
) -> Hierarchy:
    settings, sizes = config.hierarchy, transcoder.config.group_sizes
    alive = sums.firing.counts > 0
    fvu_without, groups = sums.gains.value(settings.top_tokens, settings.min_rows)
    return Hierarchy(
        transcoder=TranscoderFacts.of(checkpoint, transcoder),
        shard_set=ShardSetFacts.of(shards, config.split),
        settings=_settings(config),
        n_rows=sums.n_rows,
        fvu_without_latents=fvu_without,
        groups=groups,
        pairs=_pairs(found.best, alive, mean_abs_cosines(transcoder.W_dec, sizes, alive), sizes),
        n_edges=len(found.edges.parent),
        clusters=None if clusters is None else _summary(clusters, alive, sizes),
    )


def _pairs(best: Tensor, alive: Tensor, cosines: Tensor, sizes: tuple[int, ...]) -> tuple[GroupPair, ...]:
    """Each group with itself and with every later one; `best` [n_groups, d_sae] is `Cofiring.best`."""
    pairs, start = [], 0
    for child, size in enumerate(sizes):
        here = slice(start, start + size)
        start += size
        for parent in range(child + 1):
            shares = best[parent, here][alive[here]]
            pairs.append(
                GroupPair(
                    parent_group=parent + 1,
                    child_group=child + 1,
                    n_children=len(shares),
                    n_with_parent=int((shares > 0).sum()),
                    mean_best_parent=finite(float(shares.mean())) if parent < child else None,
                    share_implied=finite(float((shares >= IMPLIED).double().mean())) if parent < child else None,
                    mean_abs_cosine=finite(float(cosines[parent, child])),
                )
            )
    return tuple(pairs)


def _summary(clusters: Clusters, alive: Tensor, sizes: tuple[int, ...]) -> ClusterSummary:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[alive]
    inside = clusters.cluster >= 0
    n_clusters = len(clusters.cluster[inside].unique())
    member = torch.zeros(n_clusters, len(sizes), dtype=torch.bool)
    member[clusters.cluster[inside], group[inside]] = True
    return ClusterSummary(
        n_clusters=n_clusters,
        n_directions=len(group),
        share_clustered=float(inside.double().mean()) if len(group) > 0 else 0.0,
        share_mixed=finite(float((member.sum(1) > 1).double().mean())),
    )


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    shared = {name: getattr(config, name) for name in ("split", "prefix", "tokens", "batch_rows", "seed")}
    return {**config.hierarchy.model_dump(mode="json"), **shared}
