"""The record of a run. `recovery` replays run records."""

import json
import secrets
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pipeline.commit.manifest import ManifestRow
from pipeline.storage import Storage

#: Maximum size of a record; a million URIs of shards have 100 MB.
MAX_RECORD_BYTES = 256 * 1024**2
#: Lists of shards in the record, and the fields of a shard that could not be read.
_LISTS = ("removed", "deleted", "reappeared", "recovered", "unreadable", "damaged")
_FAILURE_FIELDS = ("uri", "format", "size", "rows", "error", "failed_version", "readable_rows", "damage")


class RunRecord:
    """`runs/<run id>.json`, which grows during the run. Thread-safe.

    The record is saved before the manifest is updated, so that recovery can replay its lists of shards:
    `removed` from the manifest; `deleted` from the input; `reappeared` in the input; `recovered`, which an
    earlier run could not read; and `unreadable`, which this run could not read. Shards that are labeled in
    part are in `damaged`, which is not replayed: their prediction files have the damage.
    """

    def __init__(self, storage: Storage, uri: str, start: float, values: dict[str, Any]) -> None:
        """Creates the record of a run that started at `start`, a value of `time.monotonic()`."""
        self._storage, self._uri, self._start = storage, uri, start
        self.timings: dict[str, float] = {}
        self._values = values | {name: [] for name in _LISTS} | {"timings": self.timings}
        self._lock = threading.Lock()
        self._saved: dict[str, int] = {}  # lengths of the lists

    @property
    def values(self) -> dict[str, Any]:
        """A copy of the current content."""
        with self._lock:
            return dict(self._values)

    def set(self, **values: Any) -> None:
        """Sets values."""
        with self._lock:
            self._values |= values

    def record_time(self, event: str) -> None:
        """Records the seconds from the start to an event; only its first occurrence counts."""
        with self._lock:
            self.timings.setdefault(event, round(time.monotonic() - self._start, 3))

    def add_shards(self, name: str, uris: Iterable[str]) -> None:
        """Adds shards to the list `name`."""
        with self._lock:
            self._values[name] += sorted(uris)

    def add_failure(self, row: ManifestRow) -> None:
        """Adds a shard that could not be read, or that is labeled in part."""
        name = "damaged" if row.error is None else "unreadable"
        with self._lock:
            self._values[name].append({field: getattr(row, field) for field in _FAILURE_FIELDS})

    def discard_unsaved(self) -> None:
        """Removes shards that were added since the last save."""
        with self._lock:
            for name, count in self._saved.items():
                del self._values[name][count:]

    def save(self) -> None:
        """Writes the record; raises `StorageError`."""
        with self._lock:
            self._storage.write(self._uri, json.dumps(self._values, indent=2).encode())
            self._saved = {name: len(self._values[name]) for name in _LISTS}

    def save_end(self) -> None:
        """Writes the record at the end of the run; raises `StorageError`."""
        self.record_time("ended")
        self.set(ended_at=datetime.now(UTC).isoformat())
        self.save()


def new_run_id() -> str:
    """Returns a unique id that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(3)}"
