"""The language model's side of a harvest: the contexts of one shard through the model, its activations to the host."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel

logger = logging.getLogger(__name__)

_LARGEST_BATCH_TOKENS = 2**17
"""`--batch-size auto` tries no more: the speed has long stopped to grow, and logs of a crash should stay readable."""
_WORTH_IT = 1.03
"""A larger batch is taken when it is faster by this factor."""


class Capture:
    """Runs contexts through the model in batches, whose size shrinks when the device's memory is too small for it."""

    def __init__(self, lm: LanguageModel, batch_size: int) -> None:
        self.batch_size = batch_size
        self._lm = lm

    def shard(self, tokens: Tensor, hook_points: Sequence[str], advanced: Callable[[int], None]) -> dict[str, Tensor]:
        """Activations of the contexts of one shard at each hook point.

        tokens [n_contexts, ctx_len] int32 -> position-major bfloat16 [ctx_len, n_contexts, d_model] on the CPU.
        `advanced` is told the tokens of each batch that has gone through.
        """
        n_contexts, ctx_len = tokens.shape
        found = {name: torch.empty(ctx_len, n_contexts, self._lm.d_model, dtype=torch.bfloat16) for name in hook_points}
        copies = HostCopies(staged=self._lm.device.type == "cuda")
        start = 0
        while start < n_contexts:
            batch = tokens[start : start + self.batch_size]
            acts = self._forward(batch, hook_points)
            n_done = len(next(iter(acts.values())))
            for name, buffer in found.items():
                copies.put(acts[name], buffer[:, start : start + n_done])
            copies.next_batch()
            start += n_done
            advanced(n_done * ctx_len)
        copies.finish()
        return found

    def speed(self, tokens: Tensor, hook_points: Sequence[str]) -> float:
        """Tokens per second of one batch, the second of two: the first pays for warming up."""
        seconds, n_tokens = 0.0, 0
        for _ in range(2):
            start = time.perf_counter()
            acts = self._forward(tokens[: self.batch_size], hook_points)
            acts[hook_points[-1]].cpu()  # waits for the device
            seconds = time.perf_counter() - start
            n_tokens = acts[hook_points[-1]].shape[:2].numel()
        return n_tokens / seconds

    def tune(self, tokens: Tensor, hook_points: Sequence[str]) -> int:
        """Double the batch size from 1 as long as that is faster and the memory holds it; return what was found."""
        self.batch_size, best = 1, self.speed(tokens, hook_points)
        while True:
            larger = 2 * self.batch_size
            if larger > len(tokens) or larger * tokens.shape[1] > _LARGEST_BATCH_TOKENS:
                return self.batch_size
            before, self.batch_size = self.batch_size, larger
            speed = self.speed(tokens, hook_points)
            if self.batch_size != larger or speed < _WORTH_IT * best:
                self.batch_size = before
                return before
            best = speed

    def _forward(self, batch: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        """Activations [contexts, ctx_len, d_model] of `batch`, or of its first contexts where the rest did not fit."""
        while True:
            try:
                return self._lm.capture(batch.long(), hook_points)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise UserError(
                        f"the memory of {self._lm.device} does not hold a forward pass of a single context of "
                        f"{batch.shape[1]} tokens; use a smaller --ctx-len or --dtype bf16"
                    ) from error
            if self._lm.device.type == "cuda":
                torch.cuda.empty_cache()
            self.batch_size = len(batch) // 2
            batch = batch[: self.batch_size]
            logger.warning("out of memory on %s: going on with --batch-size %d", self._lm.device, self.batch_size)


@dataclass(frozen=True, slots=True)
class _Copy:
    staged: Tensor
    ready: torch.cuda.Event | None
    into: Tensor


class HostCopies:
    """Copies activations to the host one batch behind the model, so that a GPU never waits for the host's memory.

    Staged, a batch is made position-major on the device and sent to one of two sets of (on CUDA: pinned) buffers; it
    is put into its place in the shard when the next batch is under way. Otherwise it is put there at once.
    """

    def __init__(self, *, staged: bool) -> None:
        self._staged = staged
        self._batches: deque[list[_Copy]] = deque([[]])
        self._free: dict[torch.Size, list[Tensor]] = {}

    def put(self, values: Tensor, into: Tensor) -> None:
        """values [contexts, ctx_len, width] on the device -> `into` [ctx_len, contexts, width] bfloat16 on the CPU."""
        if not self._staged:
            into.copy_(values.transpose(0, 1))
            return
        here = values.to(torch.bfloat16).transpose(0, 1).contiguous()
        free = self._free.setdefault(here.shape, [])
        staged = free.pop() if free else torch.empty(here.shape, dtype=here.dtype, pin_memory=here.is_cuda)
        staged.copy_(here, non_blocking=True)
        ready = None
        if here.is_cuda:
            ready = torch.cuda.Event()
            # Of the copy's device: with no stream it would be recorded on the current device's, and wait for nothing.
            ready.record(torch.cuda.current_stream(here.device))
        self._batches[-1].append(_Copy(staged, ready, into))

    def next_batch(self) -> None:
        """All of a batch has been put: settle the one before it."""
        self._batches.append([])
        while len(self._batches) > 2:
            self._settle(self._batches.popleft())

    def finish(self) -> None:
        """Settle everything."""
        while self._batches:
            self._settle(self._batches.popleft())
        self._batches.append([])

    def _settle(self, copies: list[_Copy]) -> None:
        for copy in copies:
            if copy.ready is not None:
                copy.ready.synchronize()
            copy.into.copy_(copy.staged)
            self._free[copy.staged.shape].append(copy.staged)
