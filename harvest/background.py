"""Threads that encode and write shards while the language model runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Barrier

from matryoshka.threads import keep_thread_count, use_one_thread


@contextmanager
def background(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch works on one core each: the model has the others."""
    with ThreadPoolExecutor(n_threads, thread_name_prefix="shard-writer") as executor:
        all_started = Barrier(n_threads)

        def begin() -> None:
            all_started.wait()
            use_one_thread()

        wait([executor.submit(begin) for _ in range(n_threads)])
        keep_thread_count()
        yield executor
