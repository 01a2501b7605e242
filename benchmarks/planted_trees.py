"""A dictionary with known parents and children, so that absorption can be counted instead of inferred.

Features form trees, as in the toy model of the Matryoshka SAE paper (Bussmann et al. 2025, arXiv 2503.17547, section
4.1): a child is only ever there when its parent is, and a parent has at most one child at a time. Where the code may
not spend a latent on each feature that is there, it pays to write parent + child with the child's latent alone: the
parent's latent then stays silent though the parent is present. That is absorption (Chanin et al. 2024, arXiv
2409.14507, section 2), and here the truth is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from matryoshka.shards import Manifest, ShardSet, ShardSetWriter, SiteFacts, plan_splits
from matryoshka.transcoder import Transcoder

CTX_LEN = 32
STANDS_FOR = 0.85
"""Cosine from which a decoder row is the parent's own: one that writes parent and child alike has 0.71."""
_BOS = 0


@dataclass(frozen=True, slots=True)
class PlantedRows:
    """Activation pairs and the features behind them."""

    x: Float[Tensor, "rows d_in"]
    y: Float[Tensor, "rows d_out"]
    parents: Bool[Tensor, "rows n_parents"]
    """Which parents are present."""
    children: Bool[Tensor, "rows n_parents n_children"]
    """Which children are; children[r, p].any() implies parents[r, p]."""


@dataclass(frozen=True, kw_only=True)
class PlantedTrees:
    """`n_parents` trees of one parent and `n_children` children, each feature with a direction at both sites.

    A parent is present with probability `p_parent`, and then one of its children with probability `p_child`, each
    child equally likely. Magnitudes are uniform in 1 +- `spread`, those of children times `child_scale`. Directions
    are random unit vectors, another at the target than at the source, as for a layer that computes something.
    """

    d_in: int = 40
    d_out: int = 32
    n_parents: int = 4
    n_children: int = 4
    p_parent: float = 0.3
    p_child: float = 0.6
    child_scale: float = 1.0
    spread: float = 0.2
    noise: float = 0.02
    """Standard deviation of the noise in each dimension of the source."""
    seed: int = 0
    """Of the directions."""

    @property
    def n_features(self) -> int:
        """Parents and children."""
        return self.n_parents * (1 + self.n_children)

    @property
    def mean_present(self) -> float:
        """Features present in a row, on average."""
        return self.n_parents * self.p_parent * (1 + self.p_child)

    def directions(self) -> tuple[Float[Tensor, "features d_in"], Float[Tensor, "features d_out"]]:
        """Unit direction of each feature at the source and at the target: parents first, then children by parent."""
        generator = torch.Generator().manual_seed(self.seed)
        sides = (torch.randn(self.n_features, width, generator=generator) for width in (self.d_in, self.d_out))
        source, target = (F.normalize(side, dim=1) for side in sides)
        return source, target

    def sample(self, n_rows: int, seed: int) -> PlantedRows:
        """`n_rows` independent rows; equal seeds give equal rows."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n_rows, self.n_parents)
        parents = torch.rand(shape, generator=generator) < self.p_parent
        has_child = parents & (torch.rand(shape, generator=generator) < self.p_child)
        which = torch.randint(self.n_children, shape, generator=generator)
        children = F.one_hot(which, self.n_children).bool() & has_child[:, :, None]
        present = torch.cat([parents, children.flatten(1)], dim=1).float()
        present[:, self.n_parents :] *= self.child_scale
        size = 1 + self.spread * (2 * torch.rand(present.shape, generator=generator) - 1)
        source, target = self.directions()
        x = (present * size) @ source + self.noise * torch.randn(n_rows, self.d_in, generator=generator)
        return PlantedRows(x=x, y=(present * size) @ target, parents=parents, children=children)


@dataclass(frozen=True, slots=True)
class PlantedAbsorption:
    """How often what stands for a parent misses it; one entry a parent."""

    latents: tuple[tuple[int, ...], ...]
    """The parent's latents: decoder row within STANDS_FOR of its target direction, or the nearest one alone."""
    cosine: tuple[float, ...]
    """Cosine of the nearest one."""
    absorbed: tuple[float, ...]
    """#{rows with a child of the parent on which none of them fires} / #{rows with a child of the parent}"""
    missed_alone: tuple[float, ...]
    """The same share over the rows with the parent and none of its children: what is missed without absorption."""

    @property
    def mean(self) -> float:
        """Mean of `absorbed` over the parents."""
        return sum(self.absorbed) / len(self.absorbed)


def planted_absorption(transcoder: Transcoder, trees: PlantedTrees, rows: PlantedRows) -> PlantedAbsorption:
    """Count absorption in threshold mode against the truth of `rows`."""
    _, target = trees.directions()
    cosine = target[: trees.n_parents] @ F.normalize(transcoder.W_dec, dim=1).T
    best = cosine.max(dim=1)
    # A parent that is split over several latents is not absorbed: every one of them may speak for it.
    stands = (cosine >= STANDS_FOR) | (cosine == best.values[:, None])
    silent = (transcoder.encode(rows.x) > 0).float() @ stands.float().T == 0
    with_child = rows.children.any(dim=2)
    alone = rows.parents & ~with_child
    return PlantedAbsorption(
        latents=tuple(tuple(row.nonzero().squeeze(1).tolist()) for row in stands),
        cosine=tuple(best.values.tolist()),
        absorbed=_share(silent, with_child),
        missed_alone=_share(silent, alone),
    )


def write_planted(path: Path, trees: PlantedTrees, n_rows: int, seed: int = 0) -> ShardSet:
    """A finished shard set of about `n_rows` rows of `trees`, a tenth of them in its val split."""
    n_contexts = -(-n_rows // (CTX_LEN - 1))
    splits = plan_splits(n_contexts, 0.1, CTX_LEN, max(trees.d_in, trees.d_out))
    sites = {"source": ("resid_mid", trees.d_in), "target": ("mlp_out", trees.d_out)}
    facts = {
        side: SiteFacts(site=site, layer=0, hook_point=f"blocks.0.hook_{site}", width=width)
        for side, (site, width) in sites.items()
    }
    manifest = Manifest(
        model={"model": "planted"},
        dataset={"name": "planted trees"},
        source=facts["source"],
        target=facts["target"],
        ctx_len=CTX_LEN,
        bos_id=_BOS,
        special_ids=(_BOS,),
        norm=None,
        codec="raw",
        splits=splits,
        settings={"trees": repr(trees), "seed": seed},
        versions={},
    )
    writer = ShardSetWriter.open(path, manifest, None)
    first = 0
    for number, split in enumerate(splits):
        for shard, n in enumerate(splits[split].shard_contexts):
            rows = trees.sample(n * CTX_LEN, _shard_seed(seed, number, shard))
            sides = (side.view(CTX_LEN, n, -1).bfloat16() for side in (rows.x, rows.y))
            tokens = torch.ones(n, CTX_LEN, dtype=torch.int32)
            tokens[:, 0] = _BOS
            documents = torch.arange(first, first + n, dtype=torch.int32)[:, None].repeat(1, CTX_LEN)
            writer.write_shard(split, shard, tokens, documents, *sides)
            first += n
    writer.finish()
    return ShardSet.open(path)


def _shard_seed(seed: int, split: int, shard: int) -> int:
    """A seed of its own for each shard."""
    return (seed * 2 + split) * 100_003 + shard + 1


def _share(silent: Bool[Tensor, "rows parents"], rows: Bool[Tensor, "rows parents"]) -> tuple[float, ...]:
    return tuple(((silent & rows).sum(0).double() / rows.sum(0).double()).tolist())
