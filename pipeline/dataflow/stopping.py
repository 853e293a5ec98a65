"""Connecting to the Ray that runs the job: a given one, the submitted job's own, or a local one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does, so that what was started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handler(interrupt, signal.SIGTERM):
        yield


@dataclass
class Stop:
    """Whether the job is asked to stop.

    Attributes:
        requested: set by the first SIGTERM or Ctrl-C.
        abandoned: whether what was begun was given up: the grace was over, or a second signal came.
    """

    requested: bool = False
    abandoned: bool = False

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """A block that ends where what was begun is to be given up."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.requested:
                raise
            self.abandoned = True


@contextmanager
def graceful_stop(grace: float) -> Iterator[Stop]:
    """Lets a first SIGTERM or Ctrl-C ask the block to stop, and interrupts it `grace` seconds later.

    A second one interrupts it at once.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested or grace <= 0:
            stop.requested = True
            raise KeyboardInterrupt
        stop.requested = True
        signal.setitimer(signal.ITIMER_REAL, grace)

    def give_up(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handler(ask, signal.SIGTERM, signal.SIGINT), _handler(give_up, signal.SIGALRM):
        try:
            yield stop
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C wait until the block has ended, and end what comes after it.

    For about a second of its start, Ray's core handles SIGTERM itself: then it ends the process at once.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    try:
        with _handler(note, signal.SIGTERM, signal.SIGINT):
            yield
    except SystemExit:  # by a handler of SIGTERM that Ray sets at first
        came = True
    if came:
        raise KeyboardInterrupt


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, former in zip(numbers, before, strict=True):
            signal.signal(number, former)
