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
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was stopped by request and shut down cleanly."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C arrived.

    After a KeyboardInterrupt inside `exec`, which `dataclass` calls, Python ends the process by SIGINT
    instead of with its exit status, even if the exception is caught. It does not do so after a subclass.
    """


class StopController:
    """The state machine: RUNNING at first, DRAINING if `requested` but not `aborted`.

    Needs the handlers that `graceful_stop` sets.
    """

    def __init__(self, grace: float) -> None:
        self.requested = self.aborted = False
        self._grace = grace

    def request(self) -> None:
        """Handles a signal; raises KeyboardInterrupt if the run is aborted."""
        if self.requested or self._grace <= 0:
            self.abort()
        self.requested = True
        signal.setitimer(signal.ITIMER_REAL, self._grace)

    def abort(self) -> None:
        """Ends the run or its grace period; raises KeyboardInterrupt."""
        self.requested = self.aborted = True
        raise KeyboardInterrupt

    @contextmanager
    def until_aborted(self) -> Iterator[None]:
        """Ends the block when the run is aborted, without raising."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.aborted:
                raise

    def raise_if_requested(self) -> None:
        """Raises `Stopped` after a clean stop, and KeyboardInterrupt after an abort."""
        if self.aborted:
            raise KeyboardInterrupt
        if self.requested:
            raise Stopped


@contextmanager
def graceful_stop(grace: float) -> Iterator[StopController]:
    """Connects a `StopController` to SIGTERM and Ctrl-C inside the block; works in the main thread only."""
    stop = StopController(grace)
    with _handler(stop.request, signal.SIGTERM, signal.SIGINT), _handler(stop.abort, signal.SIGALRM):
        try:
            yield stop
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)


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
