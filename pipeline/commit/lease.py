"""An advisory lease on a partition, so that one run at a time labels it.

The lease only saves cost: commits of concurrent runs are correct without a lease.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel

from pipeline.commit.record import new_run_id
from pipeline.storage import Storage, StorageError, Versioned, content_errors

_logger = logging.getLogger("cvt_label")

_NAME = "lease.json"
_MAX_BYTES = 64 * 1024
LeaseState = Literal["held", "released", "unfinished"]


class LeaseHeldError(RuntimeError):
    """Another run holds the lease; the message names the run and the time of expiry."""


class LeaseLostError(RuntimeError):
    """Another run has taken over the lease, because this run did not renew it in time."""


class LeaseContent(BaseModel, frozen=True):
    """The content of the lease object; its state is "unfinished" after an end without a clean shutdown."""

    run: str
    holder: str
    expires_at: datetime
    state: LeaseState

    @property
    def is_live(self) -> bool:
        """Whether a run holds the lease now."""
        return self.state == "held" and datetime.now(UTC) < self.expires_at


def was_clean_shutdown(storage: Storage, partition: str) -> bool:
    """Returns whether the last run left manifest and statistics up to date; True if there was no run."""
    found = _latest(storage, f"{partition}/{_NAME}")
    return found is None or found.content.state == "released"


def _latest(storage: Storage, uri: str) -> Versioned[LeaseContent] | None:
    with content_errors(uri, "a lease (delete the object if no run is active)"):
        parse = LeaseContent.model_validate_json
        return storage.read_latest(uri, lambda file: parse(file.read()), _MAX_BYTES)


class Lease:
    """The lease of a partition: hold it with `held`, and call `check` regularly.

    A run renews its lease until it ends; the lease of a dead run expires. The clocks of all holders should
    agree to within a fraction of the lease's duration.

    Attributes:
        found_clean_shutdown: whether the last run left manifest and statistics up to date.
        clean_shutdown: whether this run leaves them up to date; if not, the next run repairs them.
    """

    def __init__(
        self, storage: Storage, partition: str, run: str, seconds: float, poll_s: float = 5.0
    ) -> None:
        """Creates the lease, which expires after `seconds` without renewal; `held` acquires it.

        A run that had to wait gets another id than `run`, so that ids sort by the start of the work.
        """
        self.uri = f"{partition}/{_NAME}"
        self._storage, self.run = storage, run
        self.found_clean_shutdown = self.clean_shutdown = False
        self._holder = f"{socket.gethostname()}, process {os.getpid()}"
        self._seconds, self._poll_s = seconds, min(poll_s, seconds / 3)
        self._version: str | None = None
        self._lost = False
        self._stop = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)

    @contextmanager
    def held(
        self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None
    ) -> Iterator[None]:
        """Holds the lease while the block runs; see `acquire`."""
        try:
            self.found_clean_shutdown = self.acquire(wait, on_wait)
        except KeyboardInterrupt:  # may arrive right after the lease was written
            self.release(clean_shutdown=False)
            raise
        try:
            yield
        finally:
            self.release(self.clean_shutdown)

    def acquire(self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None) -> bool:
        """Acquires the lease; returns whether the last run shut down cleanly.

        If another run holds the lease, raises `LeaseHeldError`; with `wait`, calls `on_wait` once with a
        message, and waits.
        """
        before: LeaseContent | None = None
        waited = False

        def claim(version: str) -> bytes | None:
            nonlocal before
            found = _latest(self._storage, self.uri)
            before = None if found is None else found.content
            if before is not None and before.is_live and before.run != self.run:
                return None
            return self._content("held")

        while (written := self._storage.update(self.uri, claim)) is None:
            assert before is not None
            message = (
                f"{self.uri}: run {before.run} ({before.holder}) labels this partition and holds the "
                f"lease until {before.expires_at:%Y-%m-%d %H:%M:%S} UTC, unless it renews the lease"
            )
            if not wait:
                raise LeaseHeldError(f"{message}; use --wait to wait for the run to end")
            if not waited:
                on_wait(message)
            waited = True
            time.sleep(self._poll_s)
            self.run = new_run_id()
        self._version = written.version
        self._renewal.start()
        return before is None or before.state == "released"

    def check(self) -> None:
        """Raises `LeaseLostError` if another run has taken over the lease."""
        if self._lost:
            raise LeaseLostError(
                f"{self.uri}: another run has taken over, because this run did not renew the lease for more "
                f"than {self._seconds:g} s; run the same command again to resume"
            )

    def verify(self) -> None:
        """Reads the lease; raises `LeaseLostError` if another run has taken over."""
        try:
            found = _latest(self._storage, self.uri)
        except StorageError:  # the next renewal or write reports the failure
            found = None
        self._lost = self._lost or (found is not None and found.content.run != self.run)
        self.check()

    def release(self, clean_shutdown: bool) -> None:
        """Releases the lease if this run still holds it; without a clean shutdown, the next run repairs."""
        self._stop.set()
        if self._renewal.is_alive():
            self._renewal.join()
        if self._lost:
            return
        try:
            self._write("released" if clean_shutdown else "unfinished")
        except StorageError as error:  # the lease expires
            _logger.warning("could not release the lease; it expires in %g s: %s", self._seconds, error)

    def _renew(self) -> None:
        while not self._lost and not self._stop.wait(self._seconds / 3):
            try:
                self._lost = not self._write("held")
            except StorageError as error:
                _logger.warning("could not renew the lease, will retry: %s", error)

    def _write(self, state: LeaseState) -> bool:
        """Writes the lease, also if it was deleted; returns False if another run has taken over."""

        def content(version: str) -> bytes | None:
            if version == self._version:
                return self._content(state)
            found = _latest(self._storage, self.uri)
            is_ours = self._version is not None if found is None else found.content.run == self.run
            return self._content(state) if is_ours else None

        written = self._storage.update(self.uri, content, self._version)
        if written is not None:
            self._version = written.version
        return written is not None

    def _content(self, state: LeaseState) -> bytes:
        until = datetime.now(UTC) + timedelta(seconds=self._seconds if state == "held" else 0)
        content = LeaseContent(run=self.run, holder=self._holder, expires_at=until, state=state)
        return content.model_dump_json(indent=2).encode()
