"""Writing a run's manifest rows in the background, a batch at a time."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.commit.manifest import Manifest, ManifestRow

#: Maximum number of rows that wait for a rewrite of the manifest.
MOST_PENDING = 5000


class ManifestWriter:
    """Gathers the rows of a run, and writes them periodically in the background.

    Rows that are not written when a run dies are recovered from the prediction files.
    """

    def __init__(
        self, manifest: Manifest, interval: float, before_write: Callable[[], None] = lambda: None
    ) -> None:
        """Writes every `interval` seconds, or less often where that would take a twentieth of the time.

        `before_write` is called before each write, in any thread.
        """
        self._manifest, self._interval, self._before_write = manifest, interval, before_write
        self._pending: dict[str, ManifestRow] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._writing: Future[None] | None = None
        self._next = time.monotonic() + interval

    def add(self, row: ManifestRow) -> None:
        """Takes a row; writes the waiting rows if that is due. Raises `StorageError` of an earlier write."""
        with self._lock:
            self._pending[row.uri] = row
            count = len(self._pending)
        if self._writing is not None and self._writing.done():
            self._writing.result()
            self._writing = None
        due = time.monotonic() >= self._next or count >= MOST_PENDING
        if due and self._writing is None:
            self._writing = self._pool.submit(self._write)
        elif count >= 2 * MOST_PENDING and self._writing is not None:
            self._writing.result()

    def flush(self) -> None:
        """Writes the waiting rows; raises `StorageError` if they can't be written."""
        self._pool.submit(self._write).result()

    def close(self) -> None:
        """Ends the thread; writes nothing."""
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
        self._next = end + max(self._interval, 20 * (end - start))
