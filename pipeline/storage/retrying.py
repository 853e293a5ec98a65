"""Retries of transient failures, with growing pauses, and their counts."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import urllib3.exceptions

from pipeline.text import remove_credentials

T = TypeVar("T")

#: How a connection fails, below every client library; those of `requests` are OSErrors.
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)

LONGEST_PAUSE_S = 10.0
_lock = threading.Lock()
_retries: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class TransientFailure:
    """A failure that may pass: its name in counts, and the attempts after which it counts as permanent."""

    kind: str
    attempts: int = 10


def pause_after(attempt: int) -> float:
    """Returns the seconds to wait after a failed attempt, counted from 1; about half a minute in all."""
    # Jitter keeps clients that failed together from returning together.
    return min(LONGEST_PAUSE_S, 0.25 * 2.0**attempt) * random.uniform(0.5, 1)


def retry(
    action: Callable[[], T],
    transient: Callable[[Exception], TransientFailure | None],
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
        sleep(pause_after(attempt))
        attempt += 1


def retry_counts() -> Counter[str]:
    """Returns how many failures of each kind this process has retried so far."""
    with _lock:
        return _retries.copy()


def check_length(data: bytes, count: int) -> bytes:
    """Returns the body of an answer if it has `count` bytes; another number is a connection failure."""
    if len(data) != count:
        raise http.client.IncompleteRead(data, count - len(data))
    return data


def describe_error(error: BaseException) -> str:
    """Describes an exception by its class and message."""
    message = " ".join(remove_credentials(str(error)).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
