"""Stopping a run: signals, the grace period and aborting, as one state machine (`StopController`).

    state     event                                next state  effect
    RUNNING   signal, with a grace period          DRAINING    open shards are finished, others not started
    RUNNING   signal, without a grace period       ABORTED     interrupt: open shards are abandoned
    DRAINING  signal, or end of the grace period   ABORTED     interrupt
    ABORTED   signal                               ABORTED     interrupt

A signal is SIGTERM or Ctrl-C. An interrupt raises KeyboardInterrupt in the main thread. Inside
`StopController.until_aborted`, an interrupt ends only that block: complete shards are still committed. Then
`StopController.raise_if_requested` ends the run.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was stopped by request and shut down cleanly."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C arrived.

    After a KeyboardInterrupt inside `exec`, which `dataclass` calls, Python ends the process by SIGINT
    instead of with its exit status, even if the exception is caught. It does not do so after a subclass.
    """


class StopState(Enum):
    """States of the state machine; see the module's docstring."""

    RUNNING = auto()
    DRAINING = auto()
    ABORTED = auto()


class StopController:
    """The state machine; `start_timer` must call `expire` after the given seconds."""

    def __init__(self, grace: float, start_timer: Callable[[float], None]) -> None:
        self.state = StopState.RUNNING
        self._grace = grace
        self._start_timer = start_timer

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self.state is not StopState.RUNNING

    def request(self) -> None:
        """Handles a signal; raises KeyboardInterrupt if the run is aborted."""
        if self.state is not StopState.RUNNING or self._grace <= 0:
            self.expire()
        self.state = StopState.DRAINING
        self._start_timer(self._grace)

    def expire(self) -> None:
        """Ends the grace period; raises KeyboardInterrupt."""
        self.state = StopState.ABORTED
        raise KeyboardInterrupt

    @contextmanager
    def until_aborted(self) -> Iterator[None]:
        """Ends the block when the run is aborted, without raising."""
        try:
            yield
        except KeyboardInterrupt:
            if self.state is not StopState.ABORTED:
                raise

    def raise_if_requested(self) -> None:
        """Raises `Stopped` after a clean stop, and KeyboardInterrupt after an abort."""
        if self.state is StopState.DRAINING:
            raise Stopped
        if self.state is StopState.ABORTED:
            raise KeyboardInterrupt


@contextmanager
def graceful_stop(grace: float) -> Iterator[StopController]:
    """Connects a `StopController` to SIGTERM and Ctrl-C inside the block; works in the main thread only."""

    def start_timer(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    stop = StopController(grace, start_timer)
    with _handler(stop.request, signal.SIGTERM, signal.SIGINT), _handler(stop.expire, signal.SIGALRM):
        try:
            yield stop
        finally:
            if threading.current_thread() is threading.main_thread():
                start_timer(0)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C raise KeyboardInterrupt inside the block, so that clean-up code runs."""

    def interrupt() -> None:
        raise Interrupted

    with _handler(interrupt, signal.SIGTERM, signal.SIGINT):
        yield


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defers SIGTERM and Ctrl-C to the end of the block, then raises KeyboardInterrupt.

    In about the first second of its start, Ray's core has its own handler of SIGTERM, which ends the process.
    """
    has_arrived = False

    def defer() -> None:
        nonlocal has_arrived
        has_arrived = True

    try:
        with _handler(defer, signal.SIGTERM, signal.SIGINT):
            yield
    except SystemExit:  # raised by Ray's first handler of SIGTERM
        has_arrived = True
    if has_arrived:
        raise KeyboardInterrupt


@contextmanager
def _handler(action: Callable[[], None], *numbers: int) -> Iterator[None]:
    """Calls `action` when one of these signals arrives; does nothing outside the main thread.

    An ignored signal stays ignored: a shell starts background jobs of a script with Ctrl-C ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        action()

    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
