"""What each next group adds: how much of the variance, on which rows, on which tokens.

    gain_g(row) = ||y - y_hat_{g-1}||^2 - ||y - y_hat_g||^2            y_hat_0 = b_dec (+ x @ W_skip), no latent
    share_of_variance_g = sum_rows gain_g / sum_rows ||y - mean(y)||^2 = FVU_{g-1} - FVU_g

A gain can be negative on a row, and of a group as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshka.metrics import FvuSums
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

from ...measures.activations import SparseActs, base_output, group_counts, group_sums, nested_reconstructions
from ...measures.breakdown import frequency_partition, train_token_counts
from ...measures.strata import StrataSums
from ...result import finite
from ...rows.batches import RowBatch
from .result import FrequencyGain, GroupGain, TokenGain


class GainSums:
    """Sums over the rows; memory is a number for each token id and group."""

    SUMS = ("n_rows", "_fvu", "_strata", "_fires", "_active", "_token_rows", "_token_gain")

    def __init__(self, shards: ShardSet, group_sizes: tuple[int, ...]) -> None:
        counts, n_groups = train_token_counts(shards), len(group_sizes)
        self._group_sizes = group_sizes
        self._frequencies = frequency_partition(counts)
        self.n_rows = 0
        self._fvu = FvuSums()
        self._strata = StrataSums(len(self._frequencies.names), n_groups + 1, shards.d_out)
        self._fires = torch.zeros(n_groups, dtype=torch.int64)
        self._active = torch.zeros(n_groups, dtype=torch.int64)
        self._token_rows = torch.zeros(len(counts), dtype=torch.int64)
        self._token_gain = torch.zeros(len(counts), n_groups, dtype=torch.float64)

    def add(self, transcoder: Transcoder, batch: RowBatch, x: Tensor, y: Tensor, active: SparseActs) -> None:
        """Add a batch: its input `x` [rows, d_in], its target `y` [rows, d_out] and what fires there."""
        base, counts = base_output(transcoder, x), group_counts(transcoder, active)
        nested = nested_reconstructions(base, group_sums(transcoder, active, counts))
        sq_err = torch.stack([(base - y).square().sum(1), *((y_hat - y).square().sum(1) for y_hat in nested)])
        self.n_rows += len(batch)
        self._fvu.add(y, sq_err)
        l0 = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).T
        self._strata.add(self._frequencies.part_of[batch.tokens.long()], y, sq_err, l0)
        self._fires += (counts > 0).sum(0).cpu()
        self._active += counts.sum(0).cpu()
        tokens, sq_err = batch.tokens.long(), sq_err.cpu().double()
        self._token_rows += torch.bincount(tokens, minlength=len(self._token_rows))
        self._token_gain.index_add_(0, tokens, (sq_err[:-1] - sq_err[1:]).T)

    def value(self, top_tokens: int, min_rows: int) -> tuple[float | None, tuple[GroupGain, ...]]:
        """(FVU with no latent at all, one entry a group)."""
        fvu = self._fvu.value()
        before, gains = 0, []
        for index, size in enumerate(self._group_sizes):
            before += size
            gains.append(
                GroupGain(
                    group=index + 1,
                    n_latents=size,
                    prefix_end=before,
                    fvu_before=finite(fvu[index]),
                    fvu_after=finite(fvu[index + 1]),
                    share_of_variance=finite(fvu[index] - fvu[index + 1]),
                    share_of_rows=int(self._fires[index]) / self.n_rows,
                    l0=int(self._active[index]) / self.n_rows,
                    by_token_frequency=self._frequencies_of(index),
                    top_tokens=self._tokens_of(index, self._token_gain[:, index], top_tokens, min_rows),
                    top_tokens_per_row=self._tokens_of(index, self._per_row(index), top_tokens, min_rows),
                )
            )
        return finite(fvu[0]), tuple(gains)

    def _frequencies_of(self, index: int) -> tuple[FrequencyGain, ...]:
        sums = self._strata
        gain, fvu = sums.sq_err[:, index] - sums.sq_err[:, index + 1], sums.fvu()
        share = gain / gain.sum()
        return tuple(
            FrequencyGain(
                name=name,
                n_rows=int(sums.n_rows[i]),
                fvu_before=finite(float(fvu[i, index])),
                fvu_after=finite(float(fvu[i, index + 1])),
                share_of_gain=finite(float(share[i])),
            )
            for i, name in enumerate(self._frequencies.names)
            if sums.n_rows[i] > 0
        )

    def _per_row(self, index: int) -> Tensor:
        return self._token_gain[:, index] / self._token_rows.clamp_min(1)

    def _tokens_of(self, index: int, score: Tensor, n: int, min_rows: int) -> tuple[TokenGain, ...]:
        allowed = (self._token_rows >= min_rows).nonzero().squeeze(1)
        order = allowed[score[allowed].sort(descending=True, stable=True).indices][:n]
        total, mean_variance = self._token_gain[:, index].sum(), self._fvu.total_variance() / self.n_rows
        return tuple(
            TokenGain(
                token=token,
                n_rows=int(self._token_rows[token]),
                share_of_gain=finite(float(self._token_gain[token, index] / total)),
                gain_per_row=finite(float(self._per_row(index)[token] / mean_variance)),
            )
            for token in order.tolist()
        )
