"""Retries: their number, their pauses, and their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.storage import retry_counts
from pipeline.storage.retrying import TransientFailure, pause_after, retry


class PassingError(Exception):
    pass


def failing(times: int, error: Exception | None = None) -> Callable[[], int]:
    """An action that fails that often, and then returns how often it was called."""
    calls = 0

    def action() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error or PassingError(calls)
        return calls

    return action


def transient(attempts: int = 10) -> Callable[[Exception], TransientFailure | None]:
    return lambda error: TransientFailure("passing", attempts) if isinstance(error, PassingError) else None


def test_action_that_succeeds_runs_once() -> None:
    before = retry_counts()
    assert retry(failing(0), transient()) == 1
    assert retry_counts() == before


@pytest.mark.parametrize("times", [1, 5, 9])
def test_transient_failures_are_retried_and_counted(times: int) -> None:
    before, slept = retry_counts(), list[float]()
    assert retry(failing(times), transient(), sleep=slept.append) == times + 1
    assert len(slept) == times
    assert retry_counts() - before == Counter(passing=times)


@pytest.mark.parametrize("attempts", [1, 4, 10])
def test_lasting_failure_raises_the_last_exception(attempts: int) -> None:
    before = retry_counts()
    with pytest.raises(PassingError) as caught:
        retry(failing(1000), transient(attempts))
    assert caught.value.args == (attempts,)
    assert retry_counts() - before == Counter(passing=attempts - 1)  # the last one wasn't retried


def test_permanent_failure_is_raised_at_once() -> None:
    before = retry_counts()
    with pytest.raises(ValueError, match="for good"):
        retry(failing(1, ValueError("for good")), transient())
    assert retry_counts() == before


def test_an_interrupt_is_not_retried() -> None:
    def action() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(action, lambda _: TransientFailure("any"))


def test_each_failure_has_its_own_bound() -> None:
    kinds = iter(["busy", "busy", "denied"])
    with pytest.raises(PassingError) as caught:
        retry(
            failing(1000),
            lambda _: TransientFailure(kind := next(kinds), attempts=3 if kind == "denied" else 10),
        )
    assert caught.value.args == (3,)


def test_pauses_grow_up_to_a_bound_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.LONGEST_PAUSE_S", 10.0)
    runs = [[pause_after(attempt) for attempt in range(1, 10)] for _ in range(50)]
    for run in runs:
        for attempt, pause in enumerate(run, 1):
            longest = min(10.0, 0.25 * 2**attempt)
            assert longest / 2 <= pause <= longest
        assert 15 < sum(run) < 60
    for same_attempt in zip(*runs, strict=True):
        assert len(set(same_attempt)) > 40  # clients that failed together don't return together


def test_threads_count_together() -> None:
    before = retry_counts()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: retry(failing(5), transient()), range(200)))
    assert retry_counts() - before == Counter(passing=1000)


def test_returned_counts_are_a_copy() -> None:
    retry(failing(1), transient())
    retry_counts().clear()
    assert retry_counts()["passing"] > 0
