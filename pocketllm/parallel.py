"""Threads that compute alone, instead of sharing every product among all of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def thread_pool(workers: int, threads: int = 1) -> Iterator[ThreadPoolExecutor]:
    """A pool in each of whose workers torch and the kernels use so many threads.

    Here as well while it lives, since libraries below torch know but one number.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            torch.set_num_threads(threads)
            yield pool
    finally:
        torch.set_num_threads(before)
