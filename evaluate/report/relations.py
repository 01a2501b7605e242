"""How latents belong together, for the pages: parents and children, partners in firing, places on the map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.errors import UserError

from ..analyses.hierarchy.result import (
    CLUSTERS_FILE,
    COFIRING_FILE,
    EDGES_FILE,
    PARENT_FIELDS,
    RowsByLatent,
    parents_by_child,
    read_columns,
)

N_CHILDREN = 40
"""Children of a latent that its own page lists; the hierarchy page has all of them."""


class Relations:
    """The tables of `evaluate hierarchy`, each of which may be missing."""

    CHILD_FIELDS = ("child", "p_parent_given_child", "p_child_given_parent", "lift", "cosine")
    PARTNER_FIELDS = ("other", "n_both", "jaccard", "phi")

    def __init__(self, folder: Path, d_sae: int, *, with_clusters: bool = True) -> None:
        """Read what is in `folder`; clusters only `with_clusters`, since older ones may be there. Raises
        UserError when a table is broken or not of `d_sae` latents.
        """
        self.edges = read_columns(folder / EDGES_FILE, ("parent", "child"), d_sae)
        self.clusters = read_columns(folder / CLUSTERS_FILE, ("latent",), d_sae) if with_clusters else None
        partners = read_columns(folder / COFIRING_FILE, ("latent", "other"), d_sae)
        self._parents = self._children = self._partners = None
        if self.edges is not None:
            share = self.edges["p_child_given_parent"]
            self._parents = parents_by_child(self.edges, d_sae)
            self._children = RowsByLatent.of(self.edges, "parent", (-share, self.edges["child"]), d_sae)
        if partners is not None:
            self._partners = RowsByLatent.of(partners, "latent", (partners["rank"],), d_sae)

    def of(self, latent: int) -> dict[str, Any]:
        """What the page of one latent shows; only what was measured."""
        found: dict[str, Any] = {}
        if self._parents is not None and self._children is not None:
            found["parents"] = self._parents.rows(latent, PARENT_FIELDS)
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
            raise UserError(f"{CLUSTERS_FILE} has coordinates that are not numbers; run evaluate hierarchy again")
        scale = 10_000 / (max(float(np.ptp(x)), float(np.ptp(y))) or 1.0)
        return {
            "latent": self.clusters["latent"].tolist(),
            "cluster": self.clusters["cluster"].tolist(),
            "x": np.rint((x - x.min()) * scale).astype(int).tolist(),
            "y": np.rint((y.max() - y) * scale).astype(int).tolist(),
        }
