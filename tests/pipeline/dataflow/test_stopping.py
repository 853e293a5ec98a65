"""Stopping a run: the state machine by a table of events, and its connection to signals."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager

import pytest

from pipeline.dataflow import Stopped, graceful_stop
from pipeline.dataflow.stopping import StopController, interrupts_deferred, sigterm_interrupts

#: Values of `requested` and `aborted`.
RUNNING, DRAINING, ABORTED = (False, False), (True, False), (True, True)


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The grace periods that have started."""
    timers: list[float] = []
    monkeypatch.setattr("signal.setitimer", lambda which, seconds: timers.append(seconds))
    return timers


def state_of(stop: StopController) -> tuple[bool, bool]:
    return stop.requested, stop.aborted


@pytest.mark.parametrize(
    ("grace", "events", "states"),
    [
        (20, ["request"], [DRAINING]),
        (20, ["request", "request"], [DRAINING, ABORTED]),
        (20, ["request", "abort"], [DRAINING, ABORTED]),
        (20, ["request", "request", "request"], [DRAINING, ABORTED, ABORTED]),
        (20, ["request", "request", "abort"], [DRAINING, ABORTED, ABORTED]),
        (0, ["request"], [ABORTED]),
        (0, ["request", "request"], [ABORTED, ABORTED]),
    ],
)
def test_events_change_the_state_and_interrupt_when_aborted(
    timers: list[float], grace: float, events: list[str], states: list[tuple[bool, bool]]
) -> None:
    stop = StopController(grace)
    assert state_of(stop) == RUNNING
    for event, state in zip(events, states, strict=True):
        interrupted = False
        try:
            getattr(stop, event)()
        except KeyboardInterrupt:
            interrupted = True
        assert (state_of(stop), interrupted) == (state, state is ABORTED)
    assert timers == [grace] * (states[0] is DRAINING)


@pytest.mark.parametrize(("requests", "end"), [(0, None), (1, Stopped), (2, KeyboardInterrupt)])
def test_state_determines_how_a_run_ends(
    timers: list[float], requests: int, end: type[BaseException] | None
) -> None:
    stop = StopController(20)
    with stop.until_aborted():
        for _ in range(requests):
            stop.request()
    if end is None:
        stop.raise_if_requested()
        return
    with pytest.raises(KeyboardInterrupt) as caught:
        stop.raise_if_requested()
    assert caught.type is end


def test_other_interrupts_leave_the_block() -> None:
    stop = StopController(20)
    with pytest.raises(KeyboardInterrupt), stop.until_aborted():
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_requests_a_stop_and_the_timer_aborts(number: int) -> None:
    before = signal.getsignal(number)
    with graceful_stop(0.05) as stop:
        with stop.until_aborted():
            signal.raise_signal(number)
            assert state_of(stop) == DRAINING
            time.sleep(10)
            pytest.fail("not interrupted")
        assert state_of(stop) == ABORTED
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(number) == before


def test_deferred_interrupt_is_raised_after_the_block() -> None:
    done = []

    def work() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


@pytest.mark.parametrize(
    "block",
    [graceful_stop(20), interrupts_deferred(), sigterm_interrupts()],
    ids=["stop", "defer", "interrupt"],
)
def test_ignored_signal_stays_ignored_and_other_signals_work(block: AbstractContextManager[object]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with block:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
