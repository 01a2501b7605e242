"""Threads that encode and write shards while the language model runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Barrier

import torch


@contextmanager
def background(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch works on one core each.

    Otherwise each of them would start as many threads of its own as the machine has cores. On a CPU the model has those
    already, and every operation of either side then waits for the other's: a shard's sums took fifty times as long.
    """
    with ThreadPoolExecutor(n_threads, thread_name_prefix="shard-writer") as executor:
        all_started = Barrier(n_threads)

        def begin() -> None:
            all_started.wait()
            torch.get_num_threads()  # a thread's first operation takes the number for all; let that be over
            torch.set_num_threads(1)

        wait([executor.submit(begin) for _ in range(n_threads)])
        # torch counts threads for each thread, but what a new thread starts with is what was said last, anywhere.
        torch.set_num_threads(torch.get_num_threads())
        yield executor
