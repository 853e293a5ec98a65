"""An advisory lease on a partition: one run at a time, as a courtesy.

Two runs at once do no harm but to the bill: what they commit is right whoever holds the lease. It lies
beside the labels, is renewed while the run lives, and expires where it died; it also tells the next run
whether the last one has left everything in order.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pipeline.storage import ABSENT, ObjectChanged, ObjectNotFound, Storage, StorageError

_logger = logging.getLogger("cvt_label")

#: Seconds between two looks at a lease that is waited for.
_POLL = 5.0


class LeaseHeldError(RuntimeError):
    """Another run holds the lease; the message says who, and until when."""


class LeaseLostError(RuntimeError):
    """Another run has taken the lease over, since this one didn't renew it in time."""


@dataclass(frozen=True, slots=True)
class _State:
    """What the object says.

    Attributes:
        run: id of the run that holds it, or held it last.
        holder: host and process of that run.
        expires_at: until when, unless it is renewed.
        state: "held"; "released" by a run that left everything in order; "unfinished" by one that
            ended otherwise.
    """

    run: str
    holder: str
    expires_at: datetime
    state: Literal["held", "released", "unfinished"]

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self) | {"expires_at": self.expires_at.isoformat()}, indent=2).encode()

    @classmethod
    def from_bytes(cls, uri: str, data: bytes) -> _State:
        try:
            values = json.loads(data)
            return cls(**values | {"expires_at": datetime.fromisoformat(values["expires_at"])})
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(uri, f"not a lease: {error}") from None

    @property
    def is_live(self) -> bool:
        return self.state == "held" and datetime.now(UTC) < self.expires_at


def left_in_order(storage: Storage, partition: str) -> bool:
    """Whether the last run has left manifest and statistics up to date, or there was none."""
    state, _ = _read(storage, _uri(partition))
    return state is None or state.state == "released"


def _uri(partition: str) -> str:
    return f"{partition}/lease.json"


def _read(storage: Storage, uri: str) -> tuple[_State | None, str]:
    while True:
        try:
            version = storage.stat(uri).version
            return _State.from_bytes(uri, storage.read(uri, version)), version
        except ObjectNotFound:
            return None, ABSENT
        except ObjectChanged:
            continue


@dataclass
class Holding:
    """A lease while it is held.

    Attributes:
        found_in_order: whether the last run left manifest and statistics up to date.
        left_in_order: whether this one does; else the next run sees to that.
    """

    found_in_order: bool
    left_in_order: bool = False


class Lease:
    """A partition's lease: `acquire` it, ask `check` now and then, `release` it.

    The clocks of those who use it should agree to within a fraction of its length.
    """

    def __init__(
        self,
        storage: Storage,
        partition: str,
        run: str,
        seconds: float,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """Args:
        storage: where it lies.
        partition: URI of what it is on.
        run: id of the run that wants it.
        seconds: for how long it holds without renewal; it is renewed three times as often.
        new_id: names the run anew where it had to wait, so that runs sort by when they were at work.
        """
        self.uri = _uri(partition)
        self._storage = storage
        self.run = run
        self._new_id = new_id
        self._holder = f"{socket.gethostname()}, process {os.getpid()}"
        self._seconds = seconds
        self._version = ABSENT
        self._lost = False
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    @contextmanager
    def held(
        self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None
    ) -> Iterator[Holding]:
        """Holds the lease while the block runs; see `acquire`."""
        try:
            holding = Holding(self.acquire(wait, on_wait))
        except KeyboardInterrupt:  # it may have come just after the lease was taken
            state, self._version = _read(self._storage, self.uri)
            if state is not None and state.run == self.run:
                self.release(in_order=False)
            raise
        try:
            yield holding
        finally:
            self.release(holding.left_in_order)

    def acquire(self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None) -> bool:
        """Takes the lease; returns whether the last run left everything in order.

        Args:
            wait: until it is free, rather than to raise.
            on_wait: called once with what is waited for.

        Raises:
            LeaseHeldError: another run holds it.
            StorageError: the output can't be reached.
        """
        told = False
        while True:
            state, version = _read(self._storage, self.uri)
            if state is not None and state.is_live and state.run != self.run:
                message = (
                    f"{self.uri}: run {state.run} ({state.holder}) works on these labels, "
                    f"and holds their lease until {state.expires_at:%Y-%m-%d %H:%M:%S} UTC or renews it"
                )
                if not wait:
                    raise LeaseHeldError(f"{message}; --wait waits for it")
                if not told:
                    on_wait(message)
                told = True
                time.sleep(min(_POLL, self._seconds / 3))
                continue
            if told and self._new_id is not None:
                self.run, told = self._new_id(), False
            try:
                self._version = self._write("held", version)
            except ObjectChanged:  # somebody was faster; or this write came through, and its answer didn't
                continue
            self._heart.start()
            return state is None or state.state == "released"

    def check(self) -> None:
        """Raises LeaseLostError if another run has taken the lease over."""
        if self._lost:
            raise LeaseLostError(
                f"{self.uri}: another run has taken over, since this one was held up for more than "
                f"{self._seconds:g} s"
            )

    def verify(self) -> None:
        """As `check`, but looks at the lease itself, not only at what the last renewal has found."""
        self._lost = self._lost or not self._is_mine()
        self.check()

    def release(self, in_order: bool) -> None:
        """Gives the lease back, if it is still this run's.

        Args:
            in_order: whether manifest and statistics are up to date; else the next run sees to that.
        """
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join()
        if self._lost:
            return
        try:
            while True:
                try:
                    self._write("released" if in_order else "unfinished", self._version)
                    return
                except ObjectChanged:
                    if not self._is_mine():
                        return
        except StorageError as error:  # it expires
            _logger.warning("the lease could not be given back: %s", error)

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(self._seconds / 3):
            try:
                self._version = self._write("held", self._version)
                renewed = time.monotonic()
            except ObjectChanged:
                self._lost = not self._is_mine()
            except StorageError as error:
                _logger.warning("the lease could not be renewed: %s", error)
                self._lost = time.monotonic() - renewed > self._seconds and not self._is_mine()
            if self._lost:
                return

    def _is_mine(self) -> bool:
        """Whether the lease is this run's after all: a write came through, and its answer didn't."""
        try:
            state, version = _read(self._storage, self.uri)
        except StorageError:
            return True
        if state is not None and state.run != self.run:
            return False
        self._version = version  # ABSENT, if somebody has removed it: the next renewal writes it anew
        return True

    def _write(self, state: Literal["held", "released", "unfinished"], expected: str) -> str:
        until = datetime.now(UTC) + timedelta(seconds=self._seconds if state == "held" else 0)
        content = _State(self.run, self._holder, until, state).to_bytes()
        return self._storage.write(self.uri, content, expected).version
