"""Retries with exponential backoff: of transient failures, which are counted, and of compare-and-swap."""

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
from pipeline.storage.objects import ObjectChanged, ObjectNotFound, StorageError

T = TypeVar("T")

#: Connection failures below the client libraries. The exceptions of `requests` are OSErrors.
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)

MAX_PAUSE_S = 10.0
_LIMIT_ATTEMPTS = 4  # each attempt may take minutes
#: Time limit of compare-and-swap: of many drivers that end together, one after another updates the manifest.
_MAX_SWAP_S = 600.0
_MAX_REFUSALS = 20  # of one reported version; they take about two minutes
_lock = threading.Lock()
_retries: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed request: the error to raise after `attempts` attempts, and its name in `retry_counts`."""

    error: StorageError
    attempts: int = 1
    kind: str = ""


def pause_after(attempt: int) -> float:
    """Returns the seconds to wait after the failed attempt with this number, counted from 1.

    Ten attempts wait about half a minute in total.
    """
    # Jitter keeps clients that failed at the same time from retrying at the same time.
    return min(MAX_PAUSE_S, 0.25 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1)


def retry(action: Callable[[], T], explain: Callable[[Exception], Failure]) -> T:
    """Runs `action`, which must be idempotent, until it succeeds or fails permanently.

    `explain` is called with the exceptions of `action`, except with a `StorageError`, which is permanent.
    """
    attempt = 1
    while True:
        try:
            return action()
        except StorageError:
            raise
        except Exception as error:
            pause = pause_before_retry(error, explain(error), attempt)
        time.sleep(pause)
        attempt += 1


def pause_before_retry(error: Exception, failure: Failure, attempt: int) -> float:
    """Counts a retry and returns the seconds to wait; raises `failure.error` after the last attempt."""
    limit = exceeded_limit(error)
    if attempt >= (_LIMIT_ATTEMPTS if limit else failure.attempts):
        raise failure.error from None  # the library's message may contain credentials
    with _lock:
        _retries[type(limit).__name__ if limit else failure.kind] += 1
    return pause_after(attempt)


def until_unchanged(
    uri: str, action: Callable[[str], T], current: Callable[[str], str], version: str | None = None
) -> T:
    """Calls `action` with `version`, then with the `current` version, until no writer replaces the object.

    Raises `ObjectChanged` after ten minutes, or `StorageError` if the store refuses the version that it
    reports.
    """
    refusals, end, attempt = Counter[str](), time.monotonic() + _MAX_SWAP_S, 0
    while True:
        if attempt or version is None:
            version = current(uri)
        try:
            return action(version)
        except (ObjectChanged, ObjectNotFound) as error:
            if error.uri != uri:
                raise
            if time.monotonic() > end:
                cause = f"other writers were faster for {_MAX_SWAP_S:g} s, last: {error.cause}"
                raise ObjectChanged(uri, cause) from None
            refusals[version] += 1
            if refusals[version] >= _MAX_REFUSALS:
                cause = f"the store refused {_MAX_REFUSALS} requests for the version that the store reports"
                raise StorageError(uri, f"{cause}; the last one: {error.cause}") from None
        if attempt:  # the first version may be an old one
            time.sleep(pause_after(attempt))
        attempt += 1


def retry_counts() -> Counter[str]:
    """Returns the number of failures that this process has retried, by kind."""
    with _lock:
        return _retries.copy()


def describe_error(error: BaseException) -> str:
    """Returns an exception's class and message on one line."""
    error = exceeded_limit(error) or error
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
