"""Which latents a rank holds when they are spread over ranks, and how the parts become whole again.

Parts are gathered as DTensors with a Shard(0) placement. The step itself (latents_over_ranks.py) works on local
tensors: DTensor has no sharding rule for a BatchTopK over all ranks, for embedding_bag with weights or for
sampled_addmm, and its own Shard(0) means contiguous blocks, which would give the rank with the first groups most of the
work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.ranks import Rank


def is_by_latent(name: str) -> bool:
    """Whether the tensor of this name in StepState.tensors() has a row for each latent."""
    return name.rpartition(".")[2] in ("W_enc", "b_enc", "W_dec", "tokens_since_fired")


@dataclass(frozen=True, slots=True)
class LatentSlice:
    """Every world-th latent of `d_sae`, from the rank's number on. Raises UserError when a rank would have none."""

    rank: Rank
    d_sae: int

    def __post_init__(self) -> None:
        if self.d_sae < self.rank.world:
            raise UserError(f"{self.d_sae} latents cannot be spread over {self.rank.world} ranks; use fewer ranks")

    @property
    def latents(self) -> range:
        """The latents of this rank, as numbers in the whole dictionary."""
        return range(self.rank.index, self.d_sae, self.rank.world)

    def numbers(self, own: Tensor) -> Tensor:
        """Numbers in the whole dictionary of this rank's latents `own`, int64."""
        return own.long() * self.rank.world + self.rank.index

    def part(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor with a row for each latent; a copy."""
        return whole[self.rank.index :: self.rank.world].clone()

    def whole(self, part: Tensor) -> Tensor:
        """The rows of all ranks in the order of the dictionary, on the CPU. All ranks call this together."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        world = self.rank.world
        n_rows = -(-self.d_sae // world)
        padded = torch.zeros(n_rows, *part.shape[1:], dtype=part.dtype)
        padded[: len(part)] = part.detach()
        mesh = init_device_mesh("cpu", (world,))
        blocks = DTensor.from_local(padded, mesh, [Shard(0)], run_check=False).full_tensor()
        # [world, n_rows, ...] -> row i of rank r is latent i * world + r.
        return blocks.view(world, n_rows, *part.shape[1:]).transpose(0, 1).flatten(0, 1)[: self.d_sae].contiguous()
