"""Which process of several this is, as torchrun says in the environment, and where they wait for each other.

harvest: rank r makes the shards of the jobs r, r + N, ... and nothing else; which text is in a shard does not depend on
N, results pass through the disk, and all that the ranks tell each other is that a stage is over. train: the runs of a
fleet are dealt to ranks, or every step is taken by all of them together (train/step/communicator.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from matryoshka.errors import UserError

T = TypeVar("T")

_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


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

    @property
    def is_first(self) -> bool:
        """The rank that speaks for all, makes folders, and finishes what is shared."""
        return self.index == 0

    def owns(self, number: int) -> bool:
        """Whether the piece of work of this number, counted from 0, is this rank's; they are dealt in turn."""
        return number % self.world == self.index

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
    def together(self, device_type: str = "cpu", patience: timedelta | None = None) -> Iterator[None]:
        """Meet the other ranks: `wait`, `agree` and collectives of torch.distributed work inside, through gloo on the
        CPU and nccl on CUDA. For a single process nothing happens.

        `patience`: how long a rank may wait for another; torch's default when None.
        """
        if self.world == 1:
            yield
            return
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.index, world_size=self.world, timeout=patience)
        try:
            yield
            self.wait()
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world > 1:
            import torch
            import torch.distributed as dist

            # A barrier of the CPU: dist.barrier would pick a GPU of its own.
            dist.all_reduce(torch.zeros(1))

    def agree(self, value: int) -> int:
        """The value that the first rank has."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        shared = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(shared, src=0)
        return int(shared)
