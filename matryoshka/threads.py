"""Threads beside the work that has the cores."""

from __future__ import annotations

import torch


def use_one_thread() -> None:
    """Let torch work on one core in the calling thread.

    Otherwise each background thread would start as many threads of its own as the machine has cores. On a CPU the
    language model or the training step has those already, and every operation of either side then waits for the
    other's: a shard's sums took fifty times as long.

    torch counts threads for each thread, but what a new one starts with is what was said last, anywhere: call
    `keep_thread_count` in the thread that does the work, before and after.
    """
    torch.get_num_threads()  # a thread's first operation takes the number for all; let that be over
    torch.set_num_threads(1)


def keep_thread_count() -> None:
    """Fix the calling thread's number of cores, and let later threads start with it."""
    torch.set_num_threads(torch.get_num_threads())
