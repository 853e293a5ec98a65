"""Retries of transient failures, with growing pauses, and their counts."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_retries: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Transient:
    """A failure that may pass: its name in counts, and the attempts after which it counts as permanent."""

    kind: str
    attempts: int = 10


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds to wait between attempts: they double from `first` up to `longest`."""

    first: float = 0.5
    longest: float = 10.0

    def after(self, attempt: int) -> float:
        """Returns the seconds to wait after a failed attempt, counted from 1."""
        # Jitter keeps clients that failed together from returning together.
        return min(self.longest, self.first * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1)


DEFAULT_PAUSES = Pauses()  # about half a minute in all


def retry(
    action: Callable[[], T],
    transient: Callable[[Exception], Transient | None],
    pauses: Pauses | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Runs `action`, which must be safe to run twice, until it succeeds or fails permanently.

    `transient` classifies an exception; None is a permanent failure.
    """
    attempt = 1
    while True:
        try:
            return action()
        except Exception as error:
            failure = transient(error)
            if failure is None or attempt >= failure.attempts:
                raise
            with _lock:
                _retries[failure.kind] += 1
        sleep((pauses or DEFAULT_PAUSES).after(attempt))
        attempt += 1


def retries() -> Counter[str]:
    """Returns how many failures of each kind this process has retried so far."""
    with _lock:
        return _retries.copy()
