"""`evaluate match`: which latents of one transcoder another one has too.

    max_cosine_i = max_j cos(W_dec_A[i], W_dec_B[j])                    (their mean is the MMCS of Sharkey et al. 2022)
    max_correlation_i = max_j r(a_i, b_j)                               Pearson's r of the activations on the same rows

The two may be runs, prefixes, transcoders of other projects, and of different layers: each then has a shard set of its
own, harvested from the same text, so that row r of one is row r of the other; every batch is checked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.runs import make_directory
from matryoshka.shards import ShardSet

from ...analysis import Progress, Silent
from ...config import EvaluateConfig
from ...measures.activation_log import ActivationLog
from ...measures.activations import SparseActs, active_latents
from ...measures.pair_sums import pair_products
from ...result import finite
from ...rows.batches import RowBatch, count_rows, input_and_target, row_batches
from ...subject.subjects import Subject, load_subject, no_shards, own_shards, shards_of_all
from .result import Best, GroupMatch, Matching, MatchingSide, write_matching

CLOSE = 0.7
"""Cosines and correlations from here on count as "the same latent" in the summaries."""
_TILE_BYTES = 256 * 2**20
_CELLS_AT_ONCE = 4 * 2**20


@dataclass
class _Moments:
    """Sums of the activations of each latent of one side."""

    n_rows: int
    count: Tensor
    """[d_sae] int64 rows on which it fires"""
    total: Tensor
    """[d_sae] float64"""
    total_sq: Tensor
    """[d_sae] float64"""

    @classmethod
    def empty(cls, d_sae: int) -> _Moments:
        zeros = torch.zeros(d_sae, dtype=torch.float64)
        return cls(0, torch.zeros(d_sae, dtype=torch.int64), zeros, zeros.clone())

    def add(self, active: SparseActs) -> None:
        latent, value = active.latent.cpu(), active.value.cpu().double()
        self.n_rows += active.n_rows
        self.count += torch.bincount(latent, minlength=len(self.count))
        self.total += torch.bincount(latent, weights=value, minlength=len(self.count))
        self.total_sq += torch.bincount(latent, weights=value.square(), minlength=len(self.count))

    def scatter(self) -> Tensor:
        """[d_sae] float64: sqrt(N sum a^2 - (sum a)^2)."""
        return (self.n_rows * self.total_sq - self.total.square()).clamp_min(0).sqrt()


def match(
    one: str,
    other: str,
    config: EvaluateConfig,
    *,
    other_shards: Path | None = None,
    progress: Progress | None = None,
) -> Matching:
    """Match the transcoders that `one` and `other` name (see `load_subject`).

    Both are run on `config.shards`, else on what `one` was trained on; `other` on `other_shards` where that is given,
    or on its own set where that is of another layer and no set was named. With `config.out` the result and
    a table of all latents are published there. Raises UserError for invalid input.
    """
    progress = progress or Silent()
    if config.prefix is not None:
        raise UserError("a prefix is named with its run here, as data/runs/l17-k96@2 for the first two groups")
    sets = _shard_sets(one, other, config, other_shards, progress)
    subjects = [load_subject(text, shards) for text, shards in zip((one, other), sets, strict=True)]
    if config.out is not None:
        make_directory(config.out)
    n_rows, device = count_rows(sets[0], config.split, config.tokens), resolve_device(config.device)
    with tempfile.TemporaryDirectory(prefix="match-", dir=config.out) as folder:
        logs = [ActivationLog(Path(folder), name, with_values=True) for name in ("one", "other")]
        moments = [_Moments.empty(subject.transcoder.config.d_sae) for subject in subjects]
        for subject in subjects:
            subject.transcoder.to(device)
        progress.started(f"{subjects[0].name}, {subjects[1].name}", n_rows)
        for batches in _batches(sets, config):
            for subject, shards, batch, log, sums in zip(subjects, sets, batches, logs, moments, strict=True):
                x, _ = input_and_target(subject.transcoder, shards, batch)
                active = active_latents(subject.transcoder, x)
                log.add(active)
                sums.add(active)
            progress.advanced(len(batches[0]))
        correlation = _correlations(logs[0], logs[1], moments[0], moments[1])
    cosine = _cosines(subjects[0].transcoder.W_dec, subjects[1].transcoder.W_dec, [m.count > 0 for m in moments])
    result = Matching(
        shard_sets=tuple(shards.name for shards in sets),
        shard_set_digests=tuple(shards.digest for shards in sets),
        split=config.split,
        val_unit="block" if any(shards.val_unit == "block" for shards in sets) else "document",
        tokens=config.tokens,
        n_rows=moments[0].n_rows,
        close=CLOSE,
        sides=tuple(
            _side(subject, sums, near, alike, alike_back)
            for subject, sums, near, alike, alike_back in zip(
                subjects, moments, cosine, correlation, correlation[::-1], strict=True
            )
        ),
    )
    if config.out is not None:
        write_matching(config.out, result, cosine, correlation)
    return result


def _shard_sets(
    one: str, other: str, config: EvaluateConfig, other_shards: Path | None, progress: Progress
) -> list[ShardSet]:
    if config.shards is not None or other_shards is not None:
        first = shards_of_all([one], config.shards, progress.noted)
        return [first, first if other_shards is None else ShardSet.open(other_shards)]
    own = [own_shards(text, progress.noted) for text in (one, other)]
    first, second = own[0] or own[1], own[1]
    if first is None:
        raise no_shards([one, other])
    if second is None or _sites(first) == _sites(second):
        return [first, first]
    return [first, second]


def _sites(shards: ShardSet) -> tuple[str, str]:
    return shards.manifest.source.hook_point, shards.manifest.target.hook_point


def _batches(sets: list[ShardSet], config: EvaluateConfig) -> Iterator[tuple[RowBatch, RowBatch]]:
    """Batches of the same rows of both sets. Raises UserError when they are not."""
    streams = [row_batches(shards.split(config.split), config.batch_rows, config.tokens) for shards in sets]
    if sets[0].path == sets[1].path:
        yield from ((batch, batch) for batch in streams[0])
        return
    for one, other in zip(*streams, strict=False):
        same = len(one) == len(other) and all(
            torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "positions", "contexts")
        )
        if not same:
            raise UserError(
                f"the shard sets {sets[0].path} and {sets[1].path} do not hold the same tokens in the same order, so "
                "their rows cannot be matched; harvest both layers with the same text, tokens, seed and context length"
            )
        yield one, other


def _correlations(one: ActivationLog, other: ActivationLog, m_one: _Moments, m_other: _Moments) -> tuple[Best, Best]:
    """The most correlated latent of the other side, for each latent of both."""
    n_rows, scatter_one, scatter_other = m_one.n_rows, m_one.scatter(), m_other.scatter()
    d_one, d_other = len(scatter_one), len(scatter_other)
    ahead = []
    back = Best(torch.full((d_other,), -torch.inf, dtype=torch.float64), torch.full((d_other,), -1))
    for block in pair_products(one, other, d_one, d_other):
        step = max(1, _CELLS_AT_ONCE // d_other)
        for start in range(0, len(block.sums), step):
            sums, first = block.sums[start : start + step], block.start + start
            span = slice(first, first + len(sums))
            scatter = scatter_one[span, None] * scatter_other
            r = (n_rows * sums - m_one.total[span, None] * m_other.total) / scatter
            r = torch.where(scatter > 0, r, -torch.inf)
            ahead.append(r.max(1))
            value, row = r.max(0)
            better = value > back.value
            back.value[better], back.other[better] = value[better], row[better] + first
    values, others = torch.cat([top.values for top in ahead]), torch.cat([top.indices for top in ahead])
    return _known(Best(values, others)), _known(back)


def _cosines(one: Tensor, other: Tensor, alive: list[Tensor]) -> tuple[Best, Best]:
    """The decoder row of the largest cosine among those that fired, for each that fired; none where widths differ."""
    if one.shape[1] != other.shape[1]:
        none = [Best(torch.full((len(mask),), -torch.inf).double(), torch.full((len(mask),), -1)) for mask in alive]
        return _known(none[0]), _known(none[1])
    sides = [F.normalize(W_dec.float(), dim=1) for W_dec in (one, other)]
    return _nearest(sides[0], sides[1], alive[0], alive[1]), _nearest(sides[1], sides[0], alive[1], alive[0])


def _nearest(rows: Tensor, others: Tensor, alive: Tensor, others_alive: Tensor) -> Best:
    tile, values, indices = max(1, _TILE_BYTES // (4 * len(others))), [], []
    for start in range(0, len(rows), tile):
        product = (rows[start : start + tile] @ others.T).masked_fill(~others_alive.to(rows.device), -torch.inf)
        top = product.max(1)
        values.append(top.values.cpu().double())
        indices.append(top.indices.cpu())
    return _known(Best(torch.where(alive, torch.cat(values), -torch.inf), torch.cat(indices)))


def _known(best: Best) -> Best:
    found = best.value.isfinite()
    return Best(torch.where(found, best.value, float("nan")), torch.where(found, best.other, -1))


def _side(subject: Subject, sums: _Moments, cosine: Best, correlation: Best, back: Best) -> MatchingSide:
    """One transcoder: how much of it the other one has. `back` is the other one's own best correlations."""
    config = subject.transcoder.config
    own = torch.arange(config.d_sae)
    mutual = (correlation.other >= 0) & (back.other[correlation.other.clamp_min(0)] == own)
    groups, start = [], 0
    for size in (*config.group_sizes, None):
        span = slice(0, None) if size is None else slice(start, start + size)
        start += size or 0
        alive = sums.count[span] > 0
        r, near = correlation.value[span], cosine.value[span]
        groups.append(
            GroupMatch(
                n_latents=len(alive),
                n_alive=int(alive.sum()),
                mean_max_cosine=_mean(near),
                share_close_cosine=_mean(torch.where(near.isnan(), near, (near >= CLOSE).double())),
                mean_max_correlation=_mean(r),
                share_close_correlation=_mean(torch.where(r.isnan(), r, (r >= CLOSE).double())),
                share_mutual=_mean(torch.where(r.isnan(), r, mutual[span].double())),
            )
        )
    return MatchingSide(
        name=subject.name,
        weights_sha256=subject.digest(),
        layer_hook=config.source_hook,
        input=config.input,
        prefix_ends=config.prefix_ends,
        groups=tuple(groups[:-1]),
        total=groups[-1],
    )


def _mean(values: Tensor) -> float | None:
    """Over those that are defined."""
    return finite(float(values[~values.isnan()].mean()))
