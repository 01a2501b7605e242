"""Several processes of one harvest, as torchrun starts them: which one this is, and where they wait for each other.

Rank r makes the shards of the jobs r, r + N, ... and nothing else: which text is in a shard does not depend on N. All
that the ranks tell each other is that a stage is over; results pass through the disk alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from matryoshka.errors import UserError

_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
_PATIENCE = timedelta(days=7)
"""How long a rank may wait for another; one that fails ends the others through torchrun at once."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `world` ones."""

    index: int = 0
    world: int = 1
    local: int = 0
    """Number of this process on its machine, which picks its GPU."""

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun set, or the only process. Raises UserError on nonsense."""
        try:
            ranks = cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES))
        except ValueError as error:
            raise UserError(
                f"RANK, WORLD_SIZE and LOCAL_RANK should be numbers, as torchrun sets them: {error}"
            ) from error
        if not 0 <= ranks.index < ranks.world:
            raise UserError(f"RANK is {ranks.index} of WORLD_SIZE {ranks.world}; start the ranks with torchrun")
        return ranks

    @property
    def is_first(self) -> bool:
        """The rank that makes the folders and finishes the sets."""
        return self.index == 0

    def owns(self, job: int) -> bool:
        """Whether the job of this number, counted from 0 over the whole text, is this rank's."""
        return job % self.world == self.index

    def device(self, device: str) -> str:
        """The device setting of this rank: `auto` and `cuda` name one GPU for each process of a machine."""
        import torch

        if self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return device

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Meet the other ranks; `wait` and `agree` work inside. For a single process nothing happens."""
        if self.world == 1:
            yield
            return
        import torch.distributed as dist

        # gloo, also on GPUs: a word on the CPU now and then is all that passes.
        dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def agree(self, value: int) -> int:
        """The value that the first rank has."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        shared = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(shared, src=0)
        return int(shared)
