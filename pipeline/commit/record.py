"""The record of a run, as it grows. `recovery` replays records."""

import json
import secrets
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pipeline.commit.manifest import ManifestRow
from pipeline.storage import Storage

#: What is recorded of shards, and of one that couldn't be read.
_LISTS = ("removed", "deleted", "reappeared", "recovered", "unreadable")
_FAILURE = ("uri", "format", "size", "error", "failed_version")


class RunRecord:
    """`runs/<run id>.json`, as it grows. Several threads may add to it.

    What happened to shards is saved before the manifest says so, and in this order it is replayed: shards
    `removed` from the manifest, `deleted` from the input, `reappeared` in it, `recovered` of a failure that
    an earlier run had found, and `unreadable` ones.
    """

    def __init__(self, storage: Storage, uri: str, values: dict[str, Any]) -> None:
        self._storage, self._uri = storage, uri
        self._values = values | {name: [] for name in _LISTS}
        self._lock = threading.Lock()
        self._saved: dict[str, int] = {}  # lengths of the lists

    @property
    def values(self) -> dict[str, Any]:
        """What it says so far."""
        with self._lock:
            return dict(self._values)

    def note(self, **values: Any) -> None:
        """Sets values."""
        with self._lock:
            self._values |= values

    def shards(self, what: str, uris: Iterable[str]) -> None:
        """Adds shards to a list of what happened to shards."""
        with self._lock:
            self._values[what] += sorted(uris)

    def failure(self, row: ManifestRow) -> None:
        """Adds a shard that couldn't be read."""
        with self._lock:
            self._values["unreadable"].append({name: getattr(row, name) for name in _FAILURE})

    def forget(self) -> None:
        """Takes back what was added of shards since it was written last."""
        with self._lock:
            for name, count in self._saved.items():
                del self._values[name][count:]

    def save(self) -> None:
        """Writes it, if shards were added since it was written; raises `StorageError`."""
        with self._lock:
            lengths = {name: len(self._values[name]) for name in _LISTS}
            if lengths != self._saved:
                self._storage.write(self._uri, json.dumps(self._values, indent=2).encode())
                self._saved = lengths

    def end(self, **values: Any) -> None:
        """Sets the last values, and the time, and writes it."""
        self.note(ended_at=datetime.now(UTC).isoformat(), **values)
        self._saved = {}
        self.save()


def new_run_id() -> str:
    """An id that sorts by time, and that no other run has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(3)}"
