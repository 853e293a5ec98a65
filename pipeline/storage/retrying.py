"""Trying again what failed in a way that may pass, with growing pauses; and counting how often."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_FIRST_PAUSE = 0.25

_LONGEST_PAUSE = 10.0


T = TypeVar("T")


_lock = threading.Lock()

_faults: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure that may pass.

    Attributes:
        kind: what it is called in counts.
        attempts: how often to try, in all, before it counts as permanent.
    """

    kind: str
    attempts: int = 10


def retried(action: Callable[[], T], fault_of: Callable[[Exception], Fault | None]) -> T:
    """Runs `action`, again and again while it fails in a way that may pass: for half a minute, about.

    Args:
        action: what is to be done; doing it twice must do no harm.
        fault_of: says of an exception whether it may pass.

    Raises:
        Exception: the last one, where it doesn't pass.
    """
    attempt = 1
    while True:
        try:
            return action()
        except Exception as error:
            fault = fault_of(error)
            if fault is None or attempt >= fault.attempts:
                raise
            with _lock:
                _faults[fault.kind] += 1
        # Jitter keeps those that failed together from returning together.
        time.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1))
        attempt += 1


def faults() -> Counter[str]:
    """How many failures of each kind were tried again in this process, up to now."""
    with _lock:
        return _faults.copy()
