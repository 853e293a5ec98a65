"""Calls functions in threads: to hide the latency of storage requests, and to keep Ctrl-C working."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
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


def consume_in_thread(function: Callable[[Iterator[S]], T], items: Iterable[S]) -> T:
    """Calls a library's function that consumes items, in a thread; returns its result.

    Ctrl-C in the calling thread ends the items, and with them a call that does not react to signals itself.
    An exception of the items is raised as it is, although the library may have replaced it by another one.
    """
    stop, failures = Event(), list[Exception]()

    def each() -> Iterator[S]:
        try:
            for item in items:
                if stop.is_set():
                    raise InterruptedError
                yield item
        except Exception as error:
            failures.append(error)
            raise

    with ThreadPoolExecutor(1) as pool:
        try:
            result = pool.submit(function, each()).result()
        except Exception as error:
            raise (failures or [error])[0] from None
        finally:
            stop.set()
    if failures:
        raise failures[0]
    return result
