"""Retries of transient failures with exponential backoff, and counts of the retries."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import urllib3.exceptions

from pipeline.storage.limits import exceeded_limit

T = TypeVar("T")

#: Connection failures below the client libraries. The exceptions of `requests` are OSErrors.
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)

MAX_PAUSE_S = 10.0
_LIMIT_ATTEMPTS = 4  # each attempt may take minutes
_lock = threading.Lock()
_retries: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class TransientFailure:
    """A failure that a retry may resolve.

    Attributes:
        kind: Name of the failure in `retry_counts`.
        attempts: Number of attempts after which the failure counts as permanent.
    """

    kind: str
    attempts: int = 10


def pause_after(attempt: int) -> float:
    """Returns the seconds to wait after the failed attempt with this number, counted from 1.

    Ten attempts wait about half a minute in total.
    """
    # Jitter keeps clients that failed at the same time from retrying at the same time.
    return min(MAX_PAUSE_S, 0.25 * 2.0**attempt) * random.uniform(0.5, 1)


def retry(
    action: Callable[[], T],
    transient: Callable[[Exception], TransientFailure | None],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Runs `action` until it succeeds or fails permanently; a request that exceeds its limits is transient.

    Args:
        action: The function to run; must be idempotent.
        transient: Classifies an exception; None means a permanent failure.
        sleep: Waits for a number of seconds.
    """
    attempt = 1
    while True:
        try:
            return action()
        except Exception as error:
            limit = exceeded_limit(error)
            failure = TransientFailure(type(limit).__name__, _LIMIT_ATTEMPTS) if limit else transient(error)
            if failure is None or attempt >= failure.attempts:
                raise
            with _lock:
                _retries[failure.kind] += 1
        sleep(pause_after(attempt))
        attempt += 1


def retry_counts() -> Counter[str]:
    """Returns the number of failures that this process has retried, by kind."""
    with _lock:
        return _retries.copy()


def check_length(data: bytes, count: int) -> bytes:
    """Returns a response body of `count` bytes; raises `IncompleteRead` for any other length."""
    if len(data) != count:
        raise http.client.IncompleteRead(data, count - len(data))
    return data


def describe_error(error: BaseException) -> str:
    """Returns an exception's class and message on one line."""
    error = exceeded_limit(error) or error
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
