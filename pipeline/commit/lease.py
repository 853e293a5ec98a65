"""An advisory lease on a partition: one run at a time, as a courtesy.

Two concurrent runs only cost more: what they commit is correct whoever holds the lease. The lease is an
object next to the labels. It is renewed while its run lives, and expires after its run dies. It also tells
the next run whether the last one left manifest and statistics up to date.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ValidationError

from pipeline.commit.record import new_run_id
from pipeline.storage import ABSENT, Storage, StorageError, Versioned

_logger = logging.getLogger("cvt_label")

_NAME = "lease.json"
State = Literal["held", "released", "unfinished"]


class LeaseHeldError(RuntimeError):
    """Another run holds the lease; the message names the run and the time of expiry."""


class LeaseLostError(RuntimeError):
    """Another run has taken the lease over, since this one didn't renew it in time."""


class LeaseState(BaseModel, frozen=True):
    """The content of the lease object.

    Attributes:
        run: id of the run that holds the lease, or held it last.
        holder: host and process of that run.
        state: "held"; "released" by a run that left everything in order; "unfinished" by one that
            ended otherwise.
    """

    run: str
    holder: str
    expires_at: datetime
    state: State

    @property
    def is_live(self) -> bool:
        """Whether a run holds the lease now."""
        return self.state == "held" and datetime.now(UTC) < self.expires_at


def left_in_order(storage: Storage, partition: str) -> bool:
    """Whether the last run left manifest and statistics up to date, or there was none."""
    found = _latest(storage, f"{partition}/{_NAME}")
    return found is None or found.content.state == "released"


def _latest(storage: Storage, uri: str) -> Versioned[LeaseState] | None:
    return storage.read_latest(uri, lambda file: _parsed(uri, file.read()))


def _parsed(uri: str, content: bytes) -> LeaseState:
    try:
        return LeaseState.model_validate_json(content)
    except ValidationError as error:
        raise StorageError(uri, f"not a lease: {error.errors()[0]['msg']}") from None


class Lease:
    """A partition's lease: hold it with `held`, and call `check` now and then.

    The clocks of its users should agree to within a fraction of its length.

    Attributes:
        run: id of the run that holds the lease.
        found_in_order, left_in_order: whether the last run left manifest and statistics up to date, and
            whether this run does; otherwise the next run repairs them.
    """

    def __init__(
        self, storage: Storage, partition: str, run: str, seconds: float, poll_s: float = 5.0
    ) -> None:
        """A lease holds so many seconds without renewal; it is renewed three times as often.

        A run that had to wait gets another id, so that runs sort by when they worked. A lease that is waited
        for is read every `poll_s` seconds.
        """
        self.uri = f"{partition}/{_NAME}"
        self._storage, self.run = storage, run
        self.found_in_order = self.left_in_order = False
        self._holder = f"{socket.gethostname()}, process {os.getpid()}"
        self._seconds, self._poll_s = seconds, min(poll_s, seconds / 3)
        self._version: str | None = None
        self._lost = False
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._renew, name="lease", daemon=True)

    @contextmanager
    def held(
        self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None
    ) -> Iterator[None]:
        """Holds the lease while the block runs; see `acquire`."""
        try:
            self.found_in_order = self.acquire(wait, on_wait)
        except KeyboardInterrupt:  # it may have come just after the lease was taken
            with suppress(StorageError):
                found = _latest(self._storage, self.uri)
                if found is not None and found.content.run == self.run:
                    self.release(in_order=False)
            raise
        try:
            yield
        finally:
            self.release(self.left_in_order)

    def acquire(self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None) -> bool:
        """Takes the lease; returns whether the last run left everything in order.

        Where another run holds the lease, it raises `LeaseHeldError`, or waits and calls `on_wait` once with
        what is waited for.
        """
        before: LeaseState | None = None
        waited = False

        def claim(version: str) -> bytes | None:
            nonlocal before, waited
            before = None if version == ABSENT else self._read(version)
            if before is not None and before.is_live and before.run != self.run:
                return None
            if waited:
                self.run, waited = new_run_id(), False
            return self._content("held")

        while (written := self._storage.update(self.uri, claim)) is None:
            assert before is not None
            message = (
                f"{self.uri}: run {before.run} ({before.holder}) works on these labels, and holds "
                f"their lease until {before.expires_at:%Y-%m-%d %H:%M:%S} UTC or renews it"
            )
            if not wait:
                raise LeaseHeldError(f"{message}; --wait waits for it")
            if not waited:
                on_wait(message)
            waited = True
            time.sleep(self._poll_s)
        self._version = written.version
        self._heart.start()
        return before is None or before.state == "released"

    def check(self) -> None:
        """Raises LeaseLostError if another run has taken the lease over."""
        if self._lost:
            raise LeaseLostError(
                f"{self.uri}: another run has taken over, since this one was held up for more than "
                f"{self._seconds:g} s"
            )

    def verify(self) -> None:
        """As `check`, but reads the lease itself instead of relying on the last renewal."""
        try:
            found = _latest(self._storage, self.uri)
        except StorageError:  # the next renewal or write will tell
            found = None
        self._lost = self._lost or (found is not None and found.content.run != self.run)
        self.check()

    def release(self, in_order: bool) -> None:
        """Gives the lease back, if it is still this run's; unless `in_order`, the next run makes repairs."""
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join()
        if self._lost:
            return
        try:
            self._write("released" if in_order else "unfinished")
        except StorageError as error:  # it expires
            _logger.warning("the lease could not be given back: %s", error)

    def _renew(self) -> None:
        while not self._lost and not self._stop.wait(self._seconds / 3):
            try:
                self._lost = not self._write("held")
            except StorageError as error:
                _logger.warning("the lease could not be renewed: %s", error)

    def _write(self, state: State) -> bool:
        """Writes the lease, also one that was deleted; False where another run has taken it over."""

        def content(version: str) -> bytes | None:
            is_ours = version in (ABSENT, self._version) or self._read(version).run == self.run
            return self._content(state) if is_ours else None

        written = self._storage.update(self.uri, content, self._version)
        if written is not None:
            self._version = written.version
        return written is not None

    def _read(self, version: str) -> LeaseState:
        return _parsed(self.uri, self._storage.read(self.uri, version))

    def _content(self, state: State) -> bytes:
        until = datetime.now(UTC) + timedelta(seconds=self._seconds if state == "held" else 0)
        content = LeaseState(run=self.run, holder=self._holder, expires_at=until, state=state)
        return content.model_dump_json(indent=2).encode()
