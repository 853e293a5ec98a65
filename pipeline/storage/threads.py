"""Calls a function for many items in threads, which hides the latency of storage requests."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def map_in_threads(function: Callable[[S], T], items: Iterable[S], threads: int = 32) -> Iterator[T]:
    """Yields the result of each item in order, and raises the first exception; runs a few items ahead."""
    pool, calls = ThreadPoolExecutor(threads, thread_name_prefix="storage"), deque[Future[T]]()
    try:
        for item in items:
            calls.append(pool.submit(function, item))
            if len(calls) >= 2 * threads:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
