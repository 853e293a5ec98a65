"""Stopping a run: the state machine by a table of events, and its connection to signals."""

from __future__ import annotations

import signal
import time

import pytest

from pipeline.dataflow import Stopped, graceful_stop
from pipeline.dataflow.stopping import Stop, StopState, interrupts_deferred

RUNNING, FINISHING, ABANDONED = StopState


@pytest.mark.parametrize(
    ("grace", "events", "states"),
    [
        (20, ["ask"], [FINISHING]),
        (20, ["ask", "ask"], [FINISHING, ABANDONED]),
        (20, ["ask", "expire"], [FINISHING, ABANDONED]),
        (20, ["ask", "ask", "ask"], [FINISHING, ABANDONED, ABANDONED]),
        (20, ["ask", "ask", "expire"], [FINISHING, ABANDONED, ABANDONED]),
        (0, ["ask"], [ABANDONED]),
        (0, ["ask", "ask"], [ABANDONED, ABANDONED]),
    ],
)
def test_events_lead_to_states_and_interrupt_when_abandoned(
    grace: float, events: list[str], states: list[StopState]
) -> None:
    timers: list[float] = []
    stop = Stop(grace, timers.append)
    assert (stop.state, stop.requested) == (RUNNING, False)
    for event, state in zip(events, states, strict=True):
        interrupted = False
        try:
            getattr(stop, event)()
        except KeyboardInterrupt:
            interrupted = True
        assert (stop.state, interrupted, stop.requested) == (state, state is ABANDONED, True)
    assert timers == [grace] * (states[0] is FINISHING)


@pytest.mark.parametrize(("asked", "end"), [(0, None), (1, Stopped), (2, KeyboardInterrupt)])
def test_a_run_ends_as_its_state_says(asked: int, end: type[BaseException] | None) -> None:
    stop = Stop(20, lambda seconds: None)
    with stop.abandonable():
        for _ in range(asked):
            stop.ask()
    if end is None:
        stop.conclude()
        return
    with pytest.raises(KeyboardInterrupt) as caught:
        stop.conclude()
    assert caught.type is end


def test_an_interrupt_from_elsewhere_is_not_taken_for_giving_up() -> None:
    stop = Stop(20, lambda seconds: None)
    with pytest.raises(KeyboardInterrupt), stop.abandonable():
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_and_the_timer_gives_up(number: int) -> None:
    before = signal.getsignal(number)
    with graceful_stop(0.05) as stop:
        with stop.abandonable():
            signal.raise_signal(number)
            assert stop.state is FINISHING
            time.sleep(10)
            pytest.fail("not interrupted")
        assert stop.state is ABANDONED
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(number) == before


def test_deferred_interrupts_come_after_the_block() -> None:
    done = []

    def work() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
