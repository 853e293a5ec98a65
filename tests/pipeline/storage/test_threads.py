"""`map_in_threads`: order, items ahead, exceptions and the end of an abandoned iteration.

`consume_in_thread`: results, exceptions of items and of the call, and Ctrl-C.
"""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.storage import consume_in_thread, map_in_threads


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


def test_consumer_gets_all_items_in_another_thread() -> None:
    threads = set[str]()

    def consume(items: Iterator[int]) -> list[int]:
        threads.add(threading.current_thread().name)
        return list(items)

    assert consume_in_thread(consume, range(5)) == [0, 1, 2, 3, 4]
    assert threading.current_thread().name not in threads


def test_exception_of_an_item_is_raised_instead_of_that_of_the_consumer() -> None:
    """Libraries in other languages raise their own class with the text of the exception."""

    def items() -> Iterator[int]:
        yield 1
        raise KeyError("item")

    def consume(items: Iterator[int]) -> None:
        try:
            list(items)
        except KeyError:
            raise RuntimeError("library") from None

    with pytest.raises(KeyError, match="item"):
        consume_in_thread(consume, items())


def test_exception_of_the_consumer_is_raised() -> None:
    def consume(items: Iterator[int]) -> None:
        next(items)
        raise ValueError("consumer")

    with pytest.raises(ValueError, match="consumer"):
        consume_in_thread(consume, range(5))


def test_interrupt_ends_a_consumer_that_ignores_signals() -> None:
    """The main thread waits for the consumer, which gets no further item."""
    taken, errors = list[int](), list[BaseException]()
    main = threading.main_thread().ident
    assert main is not None

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    def consume(items: Iterator[int]) -> None:
        try:
            for number in items:
                if number == 2:
                    signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.01)
        except InterruptedError as error:
            errors.append(error)
            raise

    with pytest.raises(KeyboardInterrupt):
        consume_in_thread(consume, items())
    assert len(errors) == 1
    assert 3 <= len(taken) < 100
