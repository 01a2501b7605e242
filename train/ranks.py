"""Which process of several this is, as torchrun says in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from matryoshka.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among `world` ones."""

    index: int = 0
    world: int = 1
    local: int = 0
    """Number of this process on its machine, which picks its GPU."""

    @classmethod
    def from_environment(cls) -> Rank:
        """What torchrun set, or the only process. Raises UserError on nonsense."""
        try:
            rank = cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES))
        except ValueError as error:
            raise UserError(
                f"RANK, WORLD_SIZE and LOCAL_RANK should be numbers, as torchrun sets them: {error}"
            ) from error
        if not 0 <= rank.index < rank.world:
            raise UserError(f"RANK is {rank.index} of WORLD_SIZE {rank.world}; start the ranks with torchrun")
        return rank

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this rank, dealt in turn: neighbours, which are often of like size, go to different ranks."""
        return list(items[self.index :: self.world])

    def device(self, device: str) -> str:
        """The device setting of this rank: `auto` and `cuda` name one GPU for each process of a machine."""
        import torch

        if self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return device

    @contextmanager
    def together(self, device_type: str = "cpu") -> Iterator[None]:
        """Join the other ranks for collectives of torch.distributed: through gloo on the CPU, through nccl on CUDA."""
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.index, world_size=self.world)
        try:
            yield
            # A barrier of the CPU: dist.barrier would pick a GPU of its own.
            dist.all_reduce(torch.zeros(1))
        finally:
            dist.destroy_process_group()


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
