"""`evaluate hierarchy`: one pass over the rows, then which latents fire together, and what each group adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.metrics import FiringCounts
from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.transcoder import Transcoder

from ...analysis import Analysis, Job
from ...config import EvaluateConfig
from ...measures.activation_log import ActivationLog
from ...measures.activations import active_latents
from ...measures.pair_sums import pair_counts
from ...result import finite
from ...rows.batches import check_rows, count_rows, input_and_target, row_batches
from .clusters import Clusters, check_libraries, cluster_directions
from .cofiring import Cofiring, cofiring, edge_cosines
from .directions import mean_abs_cosines
from .gains import GainSums
from .result import IMPLIED, ClusterSummary, GroupPair, Hierarchy, write_clusters, write_cofiring, write_edges
from .table import clusters_line, group_table


class _Pass:
    """Everything that the pass sums up."""

    SUMS = ("n_rows", "gains", "firing", "fires")

    def __init__(self, transcoder: Transcoder, shards: ShardSet, fires: ActivationLog) -> None:
        self.n_rows = 0
        self.gains = GainSums(shards, transcoder.config.group_sizes)
        self.firing = FiringCounts(transcoder.config.d_sae)
        self.fires = fires


class HierarchyAnalysis(Analysis[Hierarchy]):
    """How the latents of a run relate: which fire together, their directions, and what each group adds."""

    name = "hierarchy"
    result = Hierarchy
    shared = ("split", "prefix", "tokens", "batch_rows", "seed")

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:  # noqa: ARG002
        """The libraries that clusters need, and rows to measure on."""
        if config.hierarchy.clusters:
            check_libraries()
        check_rows(shards, config.split)

    def make(self, job: Job) -> Hierarchy:
        """One pass over the rows, then pairs and clusters from what it kept."""
        transcoder, config = job.transcoder_on_device(), job.config
        sums = _pass(transcoder, job)
        counts, sizes = sums.firing.counts, transcoder.config.group_sizes
        blocks = pair_counts(sums.fires, transcoder.config.d_sae, transcoder.device)
        found = cofiring(blocks, counts, sums.n_rows, sizes, config.hierarchy)
        folder = job.saved.folder
        write_edges(folder, found.edges, edge_cosines(transcoder.W_dec, found.edges), counts, sums.n_rows, sizes)
        write_cofiring(folder, found.partners, counts)
        clusters = _clusters(transcoder, counts, config)
        if clusters is not None:
            write_clusters(folder, counts.nonzero().squeeze(1), clusters)
        return _hierarchy(transcoder, job, sums, found, clusters)

    def tables(self, results: Sequence[Hierarchy]) -> list[ResultTable]:
        """What each group adds, of each run."""
        return [group_table(one) for one in results]

    def notes(self, result: Hierarchy) -> list[str]:
        """The clusters in a sentence."""
        return [clusters_line(result)]


def _pass(transcoder: Transcoder, job: Job) -> _Pass:
    shards, config = job.shards, job.config
    sums = _Pass(transcoder, shards, ActivationLog(job.saved.folder))
    n_rows = count_rows(shards, config.split, config.tokens)
    job.progress.started(job.name, n_rows)
    n_done = job.saved.load(sums)
    job.progress.advanced(n_done)
    for batch in row_batches(shards.split(config.split), config.batch_rows, config.tokens, n_done):
        x, y = input_and_target(transcoder, shards, batch)
        active = active_latents(transcoder, x)
        sums.gains.add(transcoder, batch, x, y, active)
        sums.firing.add_active(active.latent.cpu(), active.n_rows)
        sums.fires.add(active)
        sums.n_rows += len(batch)
        job.progress.advanced(len(batch))
        job.saved.save_when_due(sums, sums.n_rows)
    assert sums.n_rows == n_rows
    # What follows takes a while too.
    job.saved.save(sums, n_rows)
    return sums


def _clusters(transcoder: Transcoder, counts: Tensor, config: EvaluateConfig) -> Clusters | None:
    settings = config.hierarchy
    if not settings.clusters:
        return None
    alive = (counts > 0).to(transcoder.device)
    return cluster_directions(
        transcoder.W_dec[alive], settings.neighbours, settings.min_cluster_size, config.seed, transcoder.device
    )


def _hierarchy(transcoder: Transcoder, job: Job, sums: _Pass, found: Cofiring, clusters: Clusters | None) -> Hierarchy:
    settings, sizes = job.config.hierarchy, transcoder.config.group_sizes
    alive = sums.firing.counts > 0
    fvu_without, groups = sums.gains.value(settings.top_tokens, settings.min_rows)
    return Hierarchy(
        **job.facts,
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
        span = slice(start, start + size)
        start += size
        for parent in range(child + 1):
            shares = best[parent, span][alive[span]]
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
