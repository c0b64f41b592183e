"""Threads that compute alone, instead of sharing every product among all of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def worker_threads(workers: int, threads: int = 1) -> ThreadPoolExecutor:
    """Workers in each of which torch and the kernels use so many threads."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))


@contextmanager
def thread_pool(workers: int, threads: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Such workers, and here as many threads as in each of them until they end, since libraries
    below torch know but one number."""
    before = torch.get_num_threads()
    try:
        with worker_threads(workers, threads) as pool:
            torch.set_num_threads(threads)
            yield pool
    finally:
        torch.set_num_threads(before)
