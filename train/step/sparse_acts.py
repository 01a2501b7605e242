"""Entries of a sparse [batch, d_sae] matrix as a list, and the two products a list needs that torch has no name for."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseActs:
    """Entries of the [batch, d_sae] activations as a list, in order of (latent tile, row, latent) or of (row, latent).

    rows, latents: int32 [n]; acts: fp32 [n]. Entries that are not in the list are zero. `selected` bool [n] marks the
    entries that count where a fixed shape forces padding (padding carries acts 0); None means all of them.
    """

    rows: Tensor
    latents: Tensor
    acts: Tensor
    selected: Tensor | None = None


def row_dots(crow: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """values[i] = left[row of i] . right[col[i]] for the entries of a CSR pattern: crow [n_left + 1], col [n].

    A sampled dense-dense product; a gather and multiply would write [n, d] twice and takes fifty times as long.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        values = torch.zeros(col.shape[0], device=left.device)
        shape = (left.shape[0], right.shape[0])
        pattern = torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()


def bag_starts(sorted_bags: Tensor, n_bags: int) -> Tensor:
    """[n_bags + 1] int32: where each bag begins. By search rather than bincount, which syncs the host on CUDA."""
    edges = torch.arange(n_bags + 1, dtype=sorted_bags.dtype, device=sorted_bags.device)
    return torch.searchsorted(sorted_bags, edges, out_int32=True)


def bag_sums(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """[n_bags, m]: sums of `values` [n, m] over bags, of which bag i has the rows order[starts[i] : starts[i + 1]].

    One thread adds up each sum in order: the same bits every time, which atomic additions do not give.
    """
    return F.embedding_bag(order.int(), values, starts, mode="sum", include_last_offset=True)
