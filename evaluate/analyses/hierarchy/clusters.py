"""Decoder directions laid out in the plane and clustered: UMAP (McInnes et al. 2018), HDBSCAN (Campello et al. 2013).

Both start from one graph of exact nearest neighbours by cosine, which costs as much as encoding d_sae rows. Clusters
are found in CLUSTER_DIMS dimensions without a minimum distance, where they are denser than in the plane; the plane is
for looking at. One thread and one seed: the same directions give the same bytes on one machine.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.errors import UserError

CLUSTER_DIMS = 10
MIN_SAMPLES = 3
"""Decoder directions are far apart (in the demo the nearest one is at a cosine of 0.24): as conservative as HDBSCAN is
by default, it finds 2 clusters with 99% of the latents there; leaves with this, 137 with 58% of them."""
MIN_DIRECTIONS = 20
"""Fewer are neither laid out nor clustered."""
_TILE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Clusters:
    """One entry a direction."""

    cluster: Tensor
    """[n] int64 from 0; -1 for a direction in no cluster"""
    place: Tensor
    """[n, 2] float32"""


def check_libraries() -> None:
    """Raise UserError unless the libraries of the extra are installed."""
    missing = [name for name, module in (("umap-learn", "umap"), ("scikit-learn", "sklearn")) if not find_spec(module)]
    if missing:
        raise UserError(
            f"clustering decoder directions needs {' and '.join(missing)}, which is not installed; "
            "run `pip install -e '.[structure]'` in the checkout, or leave clusters out with --no-clusters"
        )


def cluster_directions(
    directions: Tensor, n_neighbours: int, min_cluster_size: int, seed: int, device: torch.device | str = "cpu"
) -> Clusters:
    """Lay out and cluster `directions` [n, d_out]."""
    n = len(directions)
    if n < MIN_DIRECTIONS:
        return Clusters(torch.full((n,), -1), torch.zeros(n, 2))
    check_libraries()
    n_threads = torch.get_num_threads()
    try:
        return _clusters(directions, n_neighbours, min_cluster_size, seed, device)
    finally:
        # numba sets the threads of the OpenMP that torch shares with it, and with their number last bits change.
        torch.set_num_threads(n_threads)


def _clusters(
    directions: Tensor, n_neighbours: int, min_cluster_size: int, seed: int, device: torch.device | str
) -> Clusters:
    from sklearn.cluster import HDBSCAN

    n, rows = len(directions), F.normalize(directions.float(), dim=1)
    neighbours = nearest(rows.to(device), min(n_neighbours, n - 1))
    dims = min(CLUSTER_DIMS, n - 2, rows.shape[1])
    dense = _umap(rows, neighbours, n_components=dims, min_dist=0.0, seed=seed)
    options: dict[str, Any] = {"min_samples": MIN_SAMPLES, "cluster_selection_method": "leaf", "copy": True}
    labels = HDBSCAN(min_cluster_size=min(min_cluster_size, n), **options).fit(dense).labels_
    plane = _umap(rows, neighbours, n_components=2, min_dist=0.1, seed=seed)
    return Clusters(torch.from_numpy(labels).long(), torch.from_numpy(plane).float())


def nearest(rows: Tensor, n_neighbours: int) -> tuple[Tensor, Tensor]:
    """(numbers [n, n_neighbours] int64, cosine distances float32) of the nearest of the unit `rows`, itself first."""
    tile, numbers, distances = max(1, _TILE_BYTES // (4 * len(rows))), [], []
    for start in range(0, len(rows), tile):
        cosine = rows[start : start + tile] @ rows.T
        own = torch.arange(len(cosine), device=rows.device)
        cosine[own, own + start] = torch.inf
        top = cosine.topk(n_neighbours, dim=1)
        numbers.append(top.indices.cpu())
        distances.append((1 - top.values).clamp(0, 2).cpu())
    return torch.cat(numbers), torch.cat(distances)


def _umap(rows: Tensor, neighbours: tuple[Tensor, Tensor], *, n_components: int, min_dist: float, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        # We never place new points into the layout.
        warnings.filterwarnings("ignore", ".*transforming new data with transform will be unavailable", UserWarning)
        from umap import UMAP

        numbers, distances = neighbours
        layout = UMAP(
            n_neighbors=numbers.shape[1],
            n_components=n_components,
            min_dist=min_dist,
            metric="cosine",
            # Not spectral: its eigenvalue solver may fail to converge, and then starts from noise.
            init="pca",
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(numbers.int().numpy(), distances.numpy(), None),
        )
        return layout.fit_transform(rows.cpu().numpy())
