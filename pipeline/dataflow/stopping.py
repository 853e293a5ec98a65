"""Stopping a run: signals, the grace period, and giving up, as one state machine (`Stop`).

    state      meaning
    RUNNING    nobody has asked the run to stop
    FINISHING  asked to stop: open shards are finished, results of other shards are discarded
    ABANDONED  asked again, or the grace period is over: open shards are given up

    state      event                            next state  effect
    RUNNING    SIGTERM or Ctrl-C                FINISHING   the grace period starts
    RUNNING    SIGTERM or Ctrl-C, without grace ABANDONED   interrupt
    FINISHING  SIGTERM or Ctrl-C                ABANDONED   interrupt
    FINISHING  the grace period ends            ABANDONED   interrupt
    ABANDONED  either                           ABANDONED   interrupt

An interrupt raises KeyboardInterrupt in the main thread. Within `Stop.abandonable` it ends only that block,
so that finished shards are still committed. `Stop.conclude` then ends the run: with nothing in RUNNING,
`Stopped` in FINISHING, KeyboardInterrupt in ABANDONED.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has left everything in order."""


class StopState(Enum):
    """States of a run, as the module describes them."""

    RUNNING = auto()
    FINISHING = auto()
    ABANDONED = auto()


class Stop:
    """The state machine; `start_timer` makes `expire` be called after so many seconds."""

    def __init__(self, grace: float, start_timer: Callable[[float], None]) -> None:
        self.state = StopState.RUNNING
        self._grace = grace
        self._start_timer = start_timer

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self.state is not StopState.RUNNING

    def ask(self) -> None:
        """A signal arrives; raises KeyboardInterrupt where open shards are given up."""
        if self.state is not StopState.RUNNING or self._grace <= 0:
            self.expire()
        self.state = StopState.FINISHING
        self._start_timer(self._grace)

    def expire(self) -> None:
        """The grace period ends; raises KeyboardInterrupt."""
        self.state = StopState.ABANDONED
        raise KeyboardInterrupt

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block that ends where open shards are given up."""
        try:
            yield
        except KeyboardInterrupt:
            if self.state is not StopState.ABANDONED:
                raise

    def conclude(self) -> None:
        """Raises `Stopped` or KeyboardInterrupt where the run was asked to stop."""
        if self.state is StopState.FINISHING:
            raise Stopped
        if self.state is StopState.ABANDONED:
            raise KeyboardInterrupt


@contextmanager
def graceful_stop(grace: float) -> Iterator[Stop]:
    """Connects a `Stop` to SIGTERM and Ctrl-C for the length of the block; only the main thread can."""

    def start_timer(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    stop = Stop(grace, start_timer)
    with _handler(stop.ask, signal.SIGTERM, signal.SIGINT), _handler(stop.expire, signal.SIGALRM):
        try:
            yield stop
        finally:
            if threading.current_thread() is threading.main_thread():
                start_timer(0)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does, so that what was started is stopped."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with _handler(interrupt, signal.SIGTERM):
        yield


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C wait until the block has ended, and raises KeyboardInterrupt then.

    Ray's core handles SIGTERM itself in about the first second of its start: it ends the process at once.
    """
    arrived = False

    def note() -> None:
        nonlocal arrived
        arrived = True

    try:
        with _handler(note, signal.SIGTERM, signal.SIGINT):
            yield
    except SystemExit:  # raised by a handler of SIGTERM that Ray sets at first
        arrived = True
    if arrived:
        raise KeyboardInterrupt


@contextmanager
def _handler(action: Callable[[], None], *numbers: int) -> Iterator[None]:
    """Calls `action` when one of these signals arrives; does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        action()

    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, former in zip(numbers, before, strict=True):
            signal.signal(number, former)
