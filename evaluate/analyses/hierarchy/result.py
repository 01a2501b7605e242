"""hierarchy.json and the tables beside it: hierarchy.parquet, cofiring.parquet, clusters.parquet.

hierarchy.json is written last: where it is, the tables are whole and are what it says. clusters.parquet is missing
when clusters were not asked for.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matryoshka.config import Config
from matryoshka.errors import UserError
from matryoshka.runs import publish_bytes

from ...result import Result
from .clusters import Clusters
from .cofiring import Edges, Partners, jaccard, lift

EDGES_FILE, COFIRING_FILE, CLUSTERS_FILE = "hierarchy.parquet", "cofiring.parquet", "clusters.parquet"
PARENT_FIELDS = ("parent", "p_parent_given_child", "p_child_given_parent", "lift", "cosine")
"""What is read of an edge for the child's own list."""
IMPLIED = 0.5
"""A latent is implied by a parent that fires on at least this share of its rows."""

Columns = dict[str, NDArray[Any]]


class FrequencyGain(Config):
    """What a group adds on tokens of one frequency."""

    name: str
    """share of the train split's tokens"""
    n_rows: int
    fvu_before: float | None
    """of these rows, about the mean of all rows, with the groups before"""
    fvu_after: float | None
    share_of_gain: float | None
    """of all that the group adds; below 0 where it makes things worse"""


class TokenGain(Config):
    """What a group adds on one token."""

    token: int
    n_rows: int
    share_of_gain: float | None
    """of all that the group adds"""
    gain_per_row: float | None
    """squared error taken away on a row of this token, over the mean variance of a row"""


class GroupGain(Config):
    """One group and what it adds to those before it."""

    group: int
    """from 1"""
    n_latents: int
    prefix_end: int
    fvu_before: float | None
    """with the groups before; of the first group with no latent at all"""
    fvu_after: float | None
    share_of_variance: float | None
    """fvu_before - fvu_after"""
    share_of_rows: float
    """on which any of its latents fires"""
    l0: float
    """mean number of its own latents that are active in a row"""
    by_token_frequency: tuple[FrequencyGain, ...]
    top_tokens: tuple[TokenGain, ...]
    """largest share_of_gain first, of the tokens with at least settings.min_rows rows"""
    top_tokens_per_row: tuple[TokenGain, ...]
    """largest gain_per_row first, of the same tokens"""


class GroupPair(Config):
    """How the latents of two groups relate; a group with itself has directions only."""

    parent_group: int
    child_group: int
    n_children: int
    """latents of the child group that fired"""
    n_with_parent: int
    """of those, the ones that have an edge to the parent group (whether it is among the kept ones or not)"""
    mean_best_parent: float | None
    """mean over all n_children of the largest P(parent fires | child fires) among edges; 0 for one without any"""
    share_implied: float | None
    """share of n_children with a parent that fires on at least half (IMPLIED) of the rows on which the child does"""
    mean_abs_cosine: float | None
    """of the decoder rows of latents that fired"""


class ClusterSummary(Config):
    """The clusters in a few numbers."""

    n_clusters: int
    n_directions: int
    """latents that fired"""
    share_clustered: float
    share_mixed: float | None
    """share of the clusters that hold latents of more than one group"""


class Hierarchy(Result):
    """The content of hierarchy.json."""

    FILE = "hierarchy.json"
    TABLES = (EDGES_FILE, COFIRING_FILE, CLUSTERS_FILE)

    n_rows: int
    fvu_without_latents: float | None
    groups: tuple[GroupGain, ...]
    pairs: tuple[GroupPair, ...]
    n_edges: int
    clusters: ClusterSummary | None
    """null when clusters were not asked for"""

    def tables(self) -> tuple[str, ...]:
        """Without clusters.parquet where clusters were not asked for."""
        return self.TABLES if self.clusters is not None else (EDGES_FILE, COFIRING_FILE)


def write_edges(
    folder: Path, edges: Edges, cosine: Tensor, counts: Tensor, n_rows: int, group_sizes: tuple[int, ...]
) -> None:
    """hierarchy.parquet: parent, child, parent_group, child_group (from 1), n_both, p_child_given_parent,
    p_parent_given_child, lift, cosine."""
    group = torch.repeat_interleave(torch.arange(len(group_sizes)) + 1, torch.tensor(group_sizes))
    parent, child, both = edges.parent, edges.child, edges.n_both
    columns = {
        "parent": parent.int(),
        "child": child.int(),
        "parent_group": group[parent].short(),
        "child_group": group[child].short(),
        "n_both": both,
        "p_child_given_parent": both.double() / counts[parent],
        "p_parent_given_child": both.double() / counts[child],
        "lift": lift(both, counts[parent], counts[child], n_rows),
        "cosine": cosine.float(),
    }
    _publish(folder / EDGES_FILE, columns)


def write_cofiring(folder: Path, partners: Partners, counts: Tensor) -> None:
    """cofiring.parquet: latent, other, rank, n_both, jaccard, phi."""
    columns = {
        "latent": partners.latent.int(),
        "other": partners.other.int(),
        "rank": partners.rank.short(),
        "n_both": partners.n_both,
        "jaccard": jaccard(partners.n_both, counts[partners.latent], counts[partners.other]),
        "phi": partners.phi,
    }
    _publish(folder / COFIRING_FILE, columns)


def write_clusters(folder: Path, latent: Tensor, clusters: Clusters) -> None:
    """clusters.parquet: latent, cluster, x, y; the latents that fired."""
    columns = {
        "latent": latent.int(),
        "cluster": clusters.cluster.int(),
        "x": clusters.place[:, 0].contiguous(),
        "y": clusters.place[:, 1].contiguous(),
    }
    _publish(folder / CLUSTERS_FILE, columns)


def _publish(path: Path, columns: dict[str, Tensor]) -> None:
    """Equal columns give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.table({name: pa.array(column.numpy()) for name, column in columns.items()})
    pq.write_table(table, buffer, compression="zstd")
    publish_bytes(path, buffer.getvalue())


@dataclass(frozen=True, slots=True)
class RowsByLatent:
    """A table with the rows of each latent one after another."""

    columns: Columns
    starts: NDArray[np.int64]
    """[d_sae + 1]: rows starts[i] to starts[i + 1] belong to latent i."""

    @classmethod
    def of(cls, columns: Columns, key: str, order: Sequence[NDArray[Any]], d_sae: int) -> RowsByLatent:
        """The rows of `columns` by latent `key`, those of one latent by `order` (the first array decides most)."""
        rows = np.lexsort((*reversed(order), columns[key]))
        ordered = {name: column[rows] for name, column in columns.items()}
        return cls(ordered, np.searchsorted(ordered[key], np.arange(d_sae + 1)))

    def rows(self, latent: int, names: Sequence[str], most: int | None = None) -> list[list[int | float]]:
        """The values of `names` in each row of `latent`, at most `most` rows; floats with 4 digits."""
        start, stop = int(self.starts[latent]), int(self.starts[latent + 1])
        stop = stop if most is None else min(stop, start + most)
        parts = [_plain(self.columns[name][start:stop]) for name in names]
        return [list(row) for row in zip(*parts, strict=True)]

    def count(self, latent: int) -> int:
        """Number of rows of `latent`."""
        return int(self.starts[latent + 1] - self.starts[latent])


def read_columns(path: Path, latents: Sequence[str], d_sae: int) -> Columns | None:
    """The table at `path`, None where there is none.

    Raises UserError when it is broken, or a column of `latents` is not of `d_sae` latents.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
    except (OSError, ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run evaluate hierarchy again") from error
    columns = {name: table[name].to_numpy() for name in table.column_names}
    for name in latents:
        if name not in columns or (len(columns[name]) and not 0 <= columns[name].min() <= columns[name].max() < d_sae):
            raise UserError(f"{path} is not of {d_sae} latents; delete it and run evaluate hierarchy again")
    return columns


def parents_by_child(edges: Columns, d_sae: int) -> RowsByLatent:
    """The parents of each latent, those that hold most of its rows first."""
    return RowsByLatent.of(edges, "child", (-edges["p_parent_given_child"], edges["parent"]), d_sae)


def _plain(values: NDArray[Any]) -> list[Any]:
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(f"{value:.4g}") for value in values.tolist()]
