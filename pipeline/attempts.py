"""Counts attempts at pieces of work that may kill their workers.

This module is not in `dataflow`, and imports little, so that the process of the counter starts fast.
"""

from typing import NamedTuple

from pipeline.text import pluralize


class Attempt(NamedTuple):
    """An attempt at a piece of work, from number 1; `error` is why the work must not be tried again."""

    number: int
    results: int  # that earlier attempts may have delivered
    error: str | None


class Attempts:
    """Counts the attempts per piece of work, because Ray Data retries the work of dead workers forever."""

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._works: dict[str, tuple[int, int, str]] = {}

    def start(self, work: str, worker: str) -> Attempt:
        """Counts an attempt by a worker."""
        started, results, last = self._works.get(work, (0, 0, ""))
        if started < self._max_attempts:
            self._works[work] = (started + 1, results, worker)
            return Attempt(started + 1, results, None)
        error = f"{pluralize(started, 'worker')} died while {work}, the last one in {last}"
        return Attempt(started, results, f"{error}; ray.task_retries limits the attempts")

    def add_result(self, work: str, number: int) -> None:
        """Records that a result is about to be delivered."""
        started, results, worker = self._works.get(work, (1, 0, ""))  # empty if this actor was restarted
        self._works[work] = (started, max(results, number), worker)

    def finish(self, work: str) -> None:
        """Forgets the attempts at finished work; its results still count if Ray repeats the work."""
        _, results, _ = self._works.pop(work, (0, 0, ""))
        if results:
            self._works[work] = (0, results, "")
