"""An advisory lease on a partition, or a share of it, so that one run at a time labels a shard.

The lease only saves cost: commits of concurrent runs are correct without a lease.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

from pydantic import BaseModel

from pipeline.commit.record import new_run_id
from pipeline.config import WHOLE, Share
from pipeline.storage import Storage, StorageError, Versioned, content_errors, map_in_threads

_logger = logging.getLogger("cvt_label")

_NAME = re.compile(r"/lease(?:-(\d+)-of-(\d+))?\.json$")
_MAX_BYTES = 64 * 1024
_POLL_S = 5.0
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


def was_clean_shutdown(storage: Storage, partition: str, share: Share = WHOLE) -> bool:
    """Returns whether the last runs of these shards left manifest and statistics up to date; or no run."""
    leases = _overlapping(storage, partition, share).values()
    return all(lease.content.state == "released" for lease in leases)


def _overlapping(storage: Storage, partition: str, share: Share) -> dict[str, Versioned[LeaseContent]]:
    """Returns the leases, by URI, of all shares that have shards of this share."""
    names = (
        (info.uri, _NAME.search(info.uri, len(partition))) for info in storage.list(partition, prefix="lease")
    )
    uris = [
        uri for uri, name in names if name and share.overlaps(Share(*map(int, filter(None, name.groups()))))
    ]
    found = zip(uris, map_in_threads(partial(_latest, storage), uris), strict=True)
    return {uri: lease for uri, lease in found if lease is not None}


def _latest(storage: Storage, uri: str) -> Versioned[LeaseContent] | None:
    with content_errors(uri, "a lease (delete the object if no run is active)"):
        parse = LeaseContent.model_validate_json
        return storage.read_latest(uri, lambda file: parse(file.read()), _MAX_BYTES)


class Lease:
    """The lease of a partition or a share: hold it with `held`, and call `check` regularly.

    A run renews its lease until it ends; the lease of a dead run expires. The clocks of all holders should
    agree to within a fraction of the lease's duration. Each share has its own object. A run also takes over
    the expired leases of other divisions whose shares overlap with its own.

    Attributes:
        found_clean_shutdown: whether the last runs left manifest and statistics up to date.
        clean_shutdown: whether this run leaves them up to date; if not, the next run repairs them.
    """

    def __init__(
        self, storage: Storage, partition: str, run: str, seconds: float, share: Share = WHOLE
    ) -> None:
        """Creates the lease, which expires after `seconds` without renewal; `held` acquires it.

        A run that had to wait gets another id than `run`, so that ids sort by the start of the work.
        """
        name = "lease" if share == WHOLE else f"lease-{share.index}-of-{share.count}"
        self.uri = f"{partition}/{name}.json"
        self._storage, self.run = storage, run
        self._find = partial(_overlapping, storage, partition, share)
        self._taken_over: dict[str, str] = {}  # versions of leases of other divisions
        self.found_clean_shutdown = self.clean_shutdown = False
        self._holder = f"{socket.gethostname()}, process {os.getpid()}"
        self._seconds = seconds
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
            self.acquire(wait, on_wait)
        except KeyboardInterrupt:  # may arrive right after the lease was written
            self.release(clean_shutdown=False)
            raise
        try:
            yield
        finally:
            self.release(self.clean_shutdown)

    def acquire(self, wait: bool = False, on_wait: Callable[[str], None] = lambda message: None) -> bool:
        """Acquires the lease; returns whether the last runs shut down cleanly.

        If another run holds the lease, or that of a share that overlaps with this one, raises
        `LeaseHeldError`; with `wait`, calls `on_wait` once with a message, and waits.
        """
        waited = False
        while others := self._claim():
            uri, holder = others[0]
            message = (
                f"{uri}: run {holder.run} ({holder.holder}) labels this partition and holds the "
                f"lease until {holder.expires_at:%Y-%m-%d %H:%M:%S} UTC, unless it renews the lease"
            )
            if not wait:
                raise LeaseHeldError(f"{message}; use --wait to wait for the run to end")
            if not waited:
                on_wait(message)
            waited = True
            time.sleep(min(_POLL_S, self._seconds / 3))
            self.run = new_run_id()
        self._renewal.start()
        return self.found_clean_shutdown

    def _claim(self) -> list[tuple[str, LeaseContent]]:
        """Writes the lease, unless other runs hold overlapping leases; returns these leases by URI."""
        found: dict[str, Versioned[LeaseContent]] = {}
        others: list[tuple[str, LeaseContent]] = []

        def is_free() -> bool:
            nonlocal found, others
            found = self._find()
            leases = ((uri, lease.content) for uri, lease in found.items())
            others = [(uri, lease) for uri, lease in leases if lease.is_live and lease.run != self.run]
            return not others

        written = self._storage.update(self.uri, lambda _: self._content("held") if is_free() else None)
        if written is not None:
            self._version = written.version
            unclean = {uri: each.version for uri, each in found.items() if each.content.state != "released"}
            self.found_clean_shutdown = not unclean
            self._taken_over = {uri: version for uri, version in unclean.items() if uri != self.uri}
            self._mark_taken_over("unfinished")
            if not is_free():  # a run of another division has acquired or renewed its lease meanwhile
                self._write("unfinished")
        return others

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
            if clean_shutdown:
                self._mark_taken_over("released")
        except StorageError as error:  # the lease expires
            _logger.warning("could not release the lease; it expires in %g s: %s", self._seconds, error)

    def _mark_taken_over(self, state: LeaseState) -> None:
        """Writes the leases that this run has taken over, so that their runs learn of it if they continue."""
        for uri, version in [*self._taken_over.items()]:
            with suppress(StorageError):  # such as: yet another run has taken over
                self._taken_over[uri] = self._storage.write(uri, self._content(state), version).version

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
