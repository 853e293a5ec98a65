"""`map_in_threads`: order, items ahead, exceptions and the end of an abandoned iteration."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.storage import map_in_threads


def test_results_are_in_order_and_few_items_are_ahead() -> None:
    taken = list[int]()

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def slow_first(number: int) -> int:
        time.sleep(0.05 if number % 4 == 0 else 0)
        return number

    results = map_in_threads(slow_first, items(), threads=4)
    assert taken == []
    assert next(results) == 0
    assert len(taken) == 8
    assert list(results) == list(range(1, 100))


def test_first_exception_is_raised_and_items_behind_are_not_called() -> None:
    called, both = list[int](), threading.Barrier(2)

    def fail(number: int) -> int:
        called.append(number)
        if number < 2:
            both.wait(10)
            time.sleep(0.1 * (1 - number))  # the second call fails first
            raise ValueError(str(number))
        time.sleep(0.2)
        return number

    with pytest.raises(ValueError, match="0"):
        list(map_in_threads(fail, range(100), threads=2))
    assert len(called) <= 5


def test_abandoned_iteration_ends_its_threads_and_calls_nothing_more() -> None:
    called = list[int]()

    def call(number: int) -> int:
        called.append(number)
        time.sleep(0.05)
        return number

    for _ in map_in_threads(call, range(100), threads=2):
        break
    count = len(called)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("storage")]
    time.sleep(0.2)
    assert len(called) == count <= 4
