"""BatchTopK without the [batch, d_sae] matrix: encode in tiles of latents, keep candidates above a running bound."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .sparse_acts import SparseActs, bag_starts, row_dots

TILE_ELEMENTS = 1 << 20  # 4 MiB of fp32 pre-activations: a bit faster than one whole GEMM, and read again from cache
BF16_SLACK = 2.0**-7  # four times the rounding of a bf16 result


def nth_largest(values: Tensor, n: int) -> float:
    """The n-th largest of `values` [m], 0 when there are fewer."""
    return float(values.topk(n, sorted=False).values.min()) if values.numel() >= n else 0.0


def keep_largest(values: Tensor, flat: Callable[[Tensor], Tensor], n: int, nth: float | None = None) -> Tensor:
    """Positions [n] of the n largest `values` [m]; among equals of the n-th, those with the smallest `flat` index.

    flat(positions) gives flat indices, asked for only where there are ties; `nth` spares finding the n-th again.
    """
    if values.numel() <= n:
        return torch.arange(values.numel())
    nth = nth_largest(values, n) if nth is None else nth
    keep = (values >= nth).nonzero().squeeze(1)
    surplus = keep.numel() - n
    if surplus == 0:
        return keep
    tied = (values == nth).nonzero().squeeze(1)
    tied = tied[flat(tied).argsort()[: tied.numel() - surplus]]
    return torch.cat([(values > nth).nonzero().squeeze(1), tied]).sort().values


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Entries found so far: rows, latents int32 [n], acts fp32 [n], and what the encoder GEMM said of them.

    `rough` is acts itself in fp32 and the bf16 result in bf16; bounds are compared with `rough`.
    """

    rows: Tensor
    latents: Tensor
    acts: Tensor
    rough: Tensor

    def __getitem__(self, positions: Tensor) -> "_Candidates":
        return _Candidates(*(getattr(self, f.name).index_select(0, positions) for f in fields(self)))

    @staticmethod
    def joined(parts: list["_Candidates"]) -> "_Candidates":
        return _Candidates(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(_Candidates)))


def flat_nonzero(mask: np.ndarray) -> np.ndarray:
    """np.flatnonzero of a sparse bool array, eight bytes at a time where its size allows: nearly every word is 0."""
    if mask.size % 8:
        return np.flatnonzero(mask)
    words = mask.reshape(-1).view(np.uint64)
    hit = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[hit].view(np.bool_))
    return (hit[inside >> 3] << 3) + (inside & 7)


class TileEncoder:
    """`pre = x @ W_enc.T + b_enc` and the n largest strictly positive entries of it, on the CPU.

    The bound carried from step to step only saves work: results are those of an exact top-n over the whole batch,
    ties going to the smallest flat index row * d_sae + latent. With `bf16` the GEMM runs in bf16 and only finds
    candidates; every candidate's value is computed again in fp32 before the selection, so that the step differs from
    an fp32 one only where bf16 underrates an entry by more than BF16_SLACK of the n-th value (in practice: when the
    n-th value is near zero, or a row's products are far larger than their sum).
    """

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16
        self._bound = 0.0
        self._ratio = 0.9
        self._scratch: dict[str, Tensor] = {}

    def select(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, n: int) -> SparseActs:
        """x [batch, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> at most n entries, all with acts > 0."""
        d_sae, hopeful = W_enc.shape[0], self._bound
        found = self._candidates(x, W_enc, b_enc, hopeful, n)
        floor = self._floor(found, n)
        missed = hopeful > 0 and floor <= hopeful
        if missed:
            found = self._candidates(x, W_enc, b_enc, 0.0, n)
            floor = self._floor(found, n)
        n_found = found.acts.numel()
        if self.bf16:
            # what the bound let through beyond the floor must not matter, or a resumed run could differ
            found = found[((found.rough >= floor) & (found.acts > 0)).nonzero().squeeze(1)]
        nth = None if self.bf16 else floor
        best = found[keep_largest(found.acts, lambda i: found.rows[i].long() * d_sae + found.latents[i], n, nth)]
        self._aim(best.acts, n_found, n, missed)
        return SparseActs(best.rows, best.latents, best.acts)

    def _aim(self, acts: Tensor, n_found: int, n: int, missed: bool) -> None:
        """Set the next bound so that about a quarter more candidates than needed are found, more after a miss."""
        if acts.numel() < n:
            self._bound = 0.0
            return
        if missed:
            self._ratio = max(0.3, self._ratio - 0.1)
        elif n_found > 1.3 * n:
            self._ratio = min(0.97, self._ratio + 0.01)
        elif n_found < 1.15 * n:
            self._ratio = max(0.3, self._ratio - 0.02)
        self._bound = float(acts.min()) * self._ratio

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Scratch that is allocated once: fresh pages for every tile cost more than the comparison that reads them."""
        size = shape[0] * shape[1]
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = self._scratch[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)

    def _floor(self, found: _Candidates, n: int) -> float:
        """Entries from here up may be among the n largest: the n-th, less the slack of bf16; 0 if there are fewer."""
        return nth_largest(found.rough, n) * (1 - BF16_SLACK if self.bf16 else 1.0)

    def _candidates(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, bound: float, n: int) -> _Candidates:
        """Every entry above `bound`, or, once they are too many, every entry that may be among the n largest."""
        batch, d_sae = x.shape[0], W_enc.shape[0]
        x_low = x.bfloat16() if self.bf16 else x
        # the same bytes for bf16; there a wider tile also reads x for the fp32 values less often
        width = max(64, min(d_sae, TILE_ELEMENTS * (2 if self.bf16 else 1) // batch))
        parts, n_held = [], 0
        for start in range(0, d_sae, width):
            tile = slice(start, min(start + width, d_sae))
            pre = self._buffer("pre", (batch, tile.stop - start), x_low.dtype)
            torch.addmm(b_enc[tile].to(x_low.dtype), x_low, W_enc[tile].to(x_low.dtype).t(), out=pre)
            index = self._above(pre, bound)
            row, column = np.divmod(index.astype(np.int32), np.int32(tile.stop - start))
            rows, columns = torch.from_numpy(row), torch.from_numpy(column)
            acts = rough = pre.view(-1).index_select(0, torch.from_numpy(index)).float()
            if self.bf16:
                # while the tile's weights are in cache
                acts = row_dots(bag_starts(rows, batch), columns, x, W_enc[tile]) + b_enc[tile][columns]
            parts.append(_Candidates(rows, columns + start, acts, rough))
            n_held += rows.numel()
            if n_held > 4 * n:
                held = _Candidates.joined(parts)
                floor = self._floor(held, n)
                # entries equal to the floor stay: a later tile may hold an equal one with a smaller flat index
                parts = [held[(held.rough >= floor).nonzero().squeeze(1)]]
                n_held = parts[0].rows.numel()
                bound = max(bound, float(np.nextafter(np.float32(floor), np.float32(0))))
        return _Candidates.joined(parts)

    def _above(self, pre: Tensor, bound: float) -> np.ndarray:
        """Flat indices of entries above a bound >= 0. NumPy's comparison is vectorised over bytes where torch's is not,
        and its search of a mask is several times as fast as torch.nonzero."""
        mask = self._buffer("mask", (pre.shape[0], pre.shape[1]), torch.bool).numpy()
        if self.bf16:
            # non-negative bf16 numbers are ordered as their bits; every negative one is a negative int16
            bits = int(np.float32(bound).view(np.int32)) >> 16
            np.greater(pre.view(torch.int16).numpy(), np.int16(bits), out=mask)
        else:
            np.greater(pre.numpy(), np.float32(bound), out=mask)
        return flat_nonzero(mask)
