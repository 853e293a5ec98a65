"""Trying again: how often, with what pauses, and how it is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pipeline.storage import Fault, faults, retried, retrying


class PassingError(Exception):
    pass


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, instead of sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(retrying, "time", SimpleNamespace(sleep=slept.append))
    return slept


def failing(times: int, error: Exception | None = None) -> Callable[[], int]:
    """An action that fails that often, and then says how often it was called."""
    calls = 0

    def action() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error or PassingError(calls)
        return calls

    return action


def fault_of(attempts: int = 10) -> Callable[[Exception], Fault | None]:
    return lambda error: Fault("passing", attempts) if isinstance(error, PassingError) else None


def test_what_works_is_done_once(pauses: list[float]) -> None:
    before = faults()
    assert retried(failing(0), fault_of()) == 1
    assert pauses == []
    assert faults() == before


@pytest.mark.parametrize("times", [1, 5, 9])
def test_what_passes_is_tried_until_it_has_passed_and_is_counted(pauses: list[float], times: int) -> None:
    before = faults()
    assert retried(failing(times), fault_of()) == times + 1
    assert len(pauses) == times
    assert faults() - before == Counter(passing=times)


@pytest.mark.parametrize("attempts", [1, 4, 10])
def test_what_does_not_pass_raises_the_last_failure(pauses: list[float], attempts: int) -> None:
    before = faults()
    with pytest.raises(PassingError) as caught:
        retried(failing(1000), fault_of(attempts))
    assert caught.value.args == (attempts,)
    assert len(pauses) == attempts - 1
    assert faults() - before == Counter(passing=attempts - 1)  # the last one wasn't tried again


def test_what_will_not_pass_is_raised_at_once(pauses: list[float]) -> None:
    before = faults()
    with pytest.raises(ValueError, match="for good"):
        retried(failing(1, ValueError("for good")), fault_of())
    assert pauses == []
    assert faults() == before


def test_an_interrupt_is_no_fault(pauses: list[float]) -> None:
    def action() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retried(action, lambda _: Fault("any"))
    assert pauses == []


def test_each_failure_is_judged_by_its_own_bound(pauses: list[float]) -> None:
    kinds = iter(["busy", "busy", "denied"])
    with pytest.raises(PassingError) as caught:
        retried(failing(1000), lambda _: Fault(kind := next(kinds), attempts=3 if kind == "denied" else 10))
    assert caught.value.args == (3,)


def test_pauses_grow_up_to_a_bound_and_are_not_all_alike(pauses: list[float]) -> None:
    for _ in range(50):
        with pytest.raises(PassingError):
            retried(failing(1000), fault_of(10))
    runs = [pauses[i : i + 9] for i in range(0, len(pauses), 9)]
    for run in runs:
        for attempt, pause in enumerate(run, 1):
            longest = min(10.0, 0.25 * 2**attempt)
            assert longest / 2 <= pause <= longest
        assert 15 < sum(run) < 60
    for same_attempt in zip(*runs, strict=True):
        assert len(set(same_attempt)) > 40  # those that failed together don't return together


def test_threads_count_together(pauses: list[float]) -> None:
    before = faults()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: retried(failing(5), fault_of()), range(200)))
    assert faults() - before == Counter(passing=1000)


def test_the_counts_that_are_handed_out_are_a_copy(pauses: list[float]) -> None:
    retried(failing(1), fault_of())
    taken = faults()
    taken.clear()
    assert faults()["passing"] > 0
