"""How latents belong together, for the pages: parents and children, partners in firing, places on the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryoshka.errors import UserError

HIERARCHY_FILE, COFIRING_FILE, CLUSTERS_FILE = "hierarchy.parquet", "cofiring.parquet", "clusters.parquet"
N_CHILDREN = 40
"""Children of a latent that its own page lists; the hierarchy page has all of them."""

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Edges:
    """A table with the rows of each latent one after another."""

    columns: Columns
    starts: NDArray[np.int64]
    """[d_sae + 1]: rows starts[i] to starts[i + 1] belong to latent i."""

    @classmethod
    def of(cls, columns: Columns, key: str, order: Sequence[NDArray[Any]], d_sae: int) -> Edges:
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


class Relations:
    """The tables of `evaluate hierarchy`, each of which may be missing."""

    PARENT_FIELDS = ("parent", "p_parent_given_child", "p_child_given_parent", "lift", "cosine")
    CHILD_FIELDS = ("child", "p_parent_given_child", "p_child_given_parent", "lift", "cosine")
    PARTNER_FIELDS = ("other", "n_both", "jaccard", "phi")

    def __init__(self, folder: Path, d_sae: int, *, with_clusters: bool = True) -> None:
        """Read what is in `folder`; clusters only `with_clusters`, since older ones may lie there. Raises
        UserError when a table is broken or not of `d_sae` latents.
        """
        self.edges = _read(folder / HIERARCHY_FILE, ("parent", "child"), d_sae)
        self.clusters = _read(folder / CLUSTERS_FILE, ("latent",), d_sae) if with_clusters else None
        partners = _read(folder / COFIRING_FILE, ("latent", "other"), d_sae)
        self._parents = self._children = self._partners = None
        if self.edges is not None:
            inside, share = self.edges["p_parent_given_child"], self.edges["p_child_given_parent"]
            self._parents = Edges.of(self.edges, "child", (-inside, self.edges["parent"]), d_sae)
            self._children = Edges.of(self.edges, "parent", (-share, self.edges["child"]), d_sae)
        if partners is not None:
            self._partners = Edges.of(partners, "latent", (partners["rank"],), d_sae)

    def of(self, latent: int) -> dict[str, Any]:
        """What the page of one latent shows; only what was measured."""
        found: dict[str, Any] = {}
        if self._parents is not None and self._children is not None:
            found["parents"] = self._parents.rows(latent, self.PARENT_FIELDS)
            found["children"] = self._children.rows(latent, self.CHILD_FIELDS, N_CHILDREN)
            found["n_children"] = self._children.count(latent)
        if self._partners is not None:
            found["partners"] = self._partners.rows(latent, self.PARTNER_FIELDS)
        return found

    def tree(self) -> dict[str, Any] | None:
        """hierarchy.js: the columns of all edges, by parent and falling share; shares in thousandths."""
        if self._children is None:
            return None
        columns = self._children.columns
        shares = ("p_parent_given_child", "p_child_given_parent")
        return {
            "parent": columns["parent"].tolist(),
            "child": columns["child"].tolist(),
            "inside": np.rint(columns[shares[0]] * 1000).astype(int).tolist(),
            "share": np.rint(columns[shares[1]] * 1000).astype(int).tolist(),
            "lift": [float(f"{lift:.3g}") for lift in columns["lift"].tolist()],
        }

    def map(self) -> dict[str, Any] | None:
        """clusters.js: latent, cluster, and place with x and y from 0 to 10000 (the longer side; y grows downwards)."""
        if self.clusters is None or len(self.clusters["latent"]) == 0:
            return None
        x, y = (self.clusters[name].astype(np.float64) for name in ("x", "y"))
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise UserError(f"{CLUSTERS_FILE} has places that are no numbers; run evaluate hierarchy again")
        scale = 10_000 / (max(float(np.ptp(x)), float(np.ptp(y))) or 1.0)
        return {
            "latent": self.clusters["latent"].tolist(),
            "cluster": self.clusters["cluster"].tolist(),
            "x": np.rint((x - x.min()) * scale).astype(int).tolist(),
            "y": np.rint((y.max() - y) * scale).astype(int).tolist(),
        }


def _read(path: Path, latents: Sequence[str], d_sae: int) -> Columns | None:
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


def _plain(values: NDArray[Any]) -> list[Any]:
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(f"{value:.4g}") for value in values.tolist()]
