"""Retries: number of attempts, pauses, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.storage import StorageError, retry_counts
from pipeline.storage.retrying import Failure, pause_after, retry


class TemporaryError(Exception):
    pass


def failing(times: int, error: Exception | None = None) -> Callable[[], int]:
    """Returns an action that fails `times` times, and then returns the number of its calls."""
    calls = 0

    def action() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error or TemporaryError(calls)
        return calls

    return action


def temporary(attempts: int = 10) -> Callable[[Exception], Failure]:
    """Explains a `TemporaryError` as transient, and other exceptions as permanent."""
    return lambda error: Failure(
        StorageError("uri", str(error)), attempts if isinstance(error, TemporaryError) else 1, "temporary"
    )


def test_action_that_succeeds_runs_once() -> None:
    before = retry_counts()
    assert retry(failing(0), temporary()) == 1
    assert retry_counts() == before


@pytest.mark.parametrize("times", [1, 5, 9])
def test_transient_failures_are_retried_and_counted(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, slept = retry_counts(), list[float]()
    monkeypatch.setattr("time.sleep", slept.append)
    assert retry(failing(times), temporary()) == times + 1
    assert len(slept) == times
    assert retry_counts() - before == Counter(temporary=times)


@pytest.mark.parametrize("attempts", [1, 4, 10])
def test_lasting_failure_raises_the_last_error(attempts: int) -> None:
    before = retry_counts()
    with pytest.raises(StorageError, match=f"^uri: {attempts}$"):
        retry(failing(1000), temporary(attempts))
    assert retry_counts() - before == Counter(temporary=attempts - 1)  # the last failure was not retried


def test_permanent_failure_is_raised_immediately() -> None:
    before = retry_counts()
    for error in (ValueError("for good"), StorageError("uri", "for good")):
        with pytest.raises(StorageError, match=r"^uri: for good$"):
            retry(failing(1, error), temporary())
    assert retry_counts() == before


def test_interrupt_is_not_retried() -> None:
    def action() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(action, temporary())


def test_each_kind_of_failure_has_its_own_limit() -> None:
    kinds = iter(["busy", "busy", "denied"])
    with pytest.raises(StorageError, match=r"^uri: 3$"):
        retry(failing(1000), lambda error: temporary(3 if next(kinds) == "denied" else 10)(error))


def test_pauses_grow_up_to_a_limit_with_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 10.0)
    runs = [[pause_after(attempt) for attempt in range(1, 10)] for _ in range(50)]
    for run in runs:
        for attempt, pause in enumerate(run, 1):
            longest = min(10.0, 0.25 * 2**attempt)
            assert longest / 2 <= pause <= longest
        assert 15 < sum(run) < 60
    for same_attempt in zip(*runs, strict=True):
        assert len(set(same_attempt)) > 40  # concurrent failures are not retried in step


def test_counts_include_all_threads() -> None:
    before = retry_counts()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: retry(failing(5), temporary()), range(200)))
    assert retry_counts() - before == Counter(temporary=1000)


def test_returned_counts_are_a_copy() -> None:
    retry(failing(1), temporary())
    retry_counts().clear()
    assert retry_counts()["temporary"] > 0
