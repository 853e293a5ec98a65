"""Writes the manifest rows of a run while shards are committed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.commit.manifest import Manifest, ManifestRow

#: Number of rows that wait for an update of the manifest before an update is due at once.
MAX_PENDING = 5000


class ManifestWriter:
    """Collects the rows of a run and writes them periodically, in a background thread.

    If a run dies, rows that were not written are recovered from the prediction files.
    """

    def __init__(
        self,
        manifest: Manifest,
        interval: float,
        before_write: Callable[[], None] = lambda: None,
        drivers: int = 1,
    ) -> None:
        """Creates a writer; calls `before_write` before each update, in any thread.

        Updates are `interval` seconds apart, or more if those of all drivers would take more than 5 % of the
        time: only one of simultaneous updates succeeds.
        """
        self._manifest, self._interval, self._before_write = manifest, interval, before_write
        self._pending: dict[str, ManifestRow] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._writing: Future[None] | None = None
        self._drivers = drivers
        self._next = time.monotonic() + interval

    def add(self, row: ManifestRow) -> None:
        """Adds a row; starts an update if one is due. Raises the `StorageError` of an earlier update."""
        with self._lock:
            self._pending[row.uri] = row
            count = len(self._pending)
        if self._writing is not None and self._writing.done():
            self._writing.result()
            self._writing = None
        due = time.monotonic() >= self._next or count >= MAX_PENDING
        if due and self._writing is None:
            self._writing = self._pool.submit(self._write)
        elif count >= 2 * MAX_PENDING and self._writing is not None:
            self._writing.result()

    def flush(self) -> None:
        """Writes the pending rows; raises `StorageError`."""
        self._pool.submit(self._write).result()

    def close(self) -> None:
        """Stops the thread without writing pending rows."""
        self._pool.shutdown()

    def _write(self) -> None:
        with self._lock:
            rows = dict(self._pending)
        if not rows:
            return
        start = time.monotonic()
        self._before_write()
        self._manifest.update(rows)
        with self._lock:
            for uri, row in rows.items():
                if self._pending.get(uri) is row:
                    del self._pending[uri]
        end = time.monotonic()
        self._next = end + max(self._interval, 20 * self._drivers * (end - start))
