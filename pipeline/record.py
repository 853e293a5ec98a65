"""The record of a run: its configuration and selection, versions, counts, timings, how it ended, and what it
found out that no prediction file tells. From that and the files, `recovering` makes the manifest anew; by
itself it is enough to run the same again.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pipeline.manifest import ManifestRow
from pipeline.partition import Partition
from pipeline.planning import Selection
from pipeline.storage import ObjectNotFound, Storage, StorageError

_PACKAGES = (
    "cvt-label", "ray", "torch", "torchvision", "openvino", "transformers", "pyarrow", "pillow", "numpy",
    "boto3",
)  # fmt: skip
#: What is recorded of shards, and of one that couldn't be read.
_LISTS = ("removed", "gone", "present", "cured", "unreadable")
_FAILURE = ("uri", "format", "size", "error", "failed_version")


class Clock:
    """Seconds from the start to each event."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, event: str, *, again: bool = False) -> None:
        """Notes an event's time; the first one counts, unless it may happen `again`."""
        if again or event not in self.seconds:
            self.seconds[event] = round(time.monotonic() - self._start, 3)


class RunRecord:
    """`runs/<run id>.json`, as it grows. Several threads may add to it.

    What happened to shards is saved before the manifest says so, and in this order it is replayed: shards
    `removed` from the manifest, `gone` from the input, `present` in it again, `cured` of a failure that
    an earlier run had found, and `unreadable` ones.
    """

    def __init__(self, storage: Storage, uri: str, values: dict[str, Any]) -> None:
        self._storage = storage
        self._uri = uri
        self._values = values | {name: [] for name in _LISTS}
        self._lock = threading.Lock()
        self._is_saved = False
        self._saved = dict.fromkeys(_LISTS, 0)

    @property
    def is_complete(self) -> bool:
        """Whether it lists no shard that couldn't be read."""
        return not self._values["unreadable"]

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
        found = sorted(uris)
        with self._lock:
            self._values[what] += found
            self._is_saved = self._is_saved and not found

    def failure(self, row: ManifestRow) -> None:
        """Adds a shard that couldn't be read."""
        with self._lock:
            self._values["unreadable"].append({name: getattr(row, name) for name in _FAILURE})
            self._is_saved = False

    def forget(self) -> None:
        """Takes back what was added of shards since it was written last."""
        with self._lock:
            for name, count in self._saved.items():
                del self._values[name][count:]
            self._is_saved = True

    def save(self) -> None:
        """Writes it, if shards were added since it was written.

        Raises:
            StorageError: it can't be written.
        """
        with self._lock:
            if not self._is_saved:
                self._storage.write(self._uri, json.dumps(self._values, indent=2).encode())
                self._saved = {name: len(self._values[name]) for name in _LISTS}
                self._is_saved = True

    def end(self, **values: Any) -> None:
        """Sets the last values, and writes it."""
        self.note(**values)
        self._is_saved = False
        self.save()


def read_record(storage: Storage, partition: str, run: str) -> dict[str, Any] | None:
    """The record of a run; None where there is none.

    Raises:
        StorageError: it can't be read, or is no record.
    """
    uri = f"{partition}/runs/{run}.json"
    try:
        values = json.loads(storage.read(uri))
    except ObjectNotFound:
        return None
    except ValueError as error:
        raise StorageError(uri, f"not the record of a run: {error}") from None
    if not isinstance(values, dict):
        raise StorageError(uri, "not the record of a run")
    return values


def new_run_id() -> str:
    """An id that sorts by time, and that no other run has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(3)}"


@contextmanager
def recorded(partition: Partition, run: str, clock: Clock, selection: Selection) -> Iterator[RunRecord]:
    """Keeps `runs/<run id>.json`: written at once, so that a run that dies leaves a trace, and at
    the end, with how it ended.
    """
    values = {
        "run": run,
        "status": "running",
        "started_at": datetime.now(UTC).isoformat(),
        "config": partition.config.model_dump(),
        "selection": asdict(selection),
        "fingerprint": partition.fingerprint,
        "model_digest": partition.checkpoint.digest,
        "model_commit": partition.checkpoint.commit,
        "versions": _versions(),
    }
    record = RunRecord(partition.storage, f"{partition.uri}/runs/{run}.json", values)

    def end(status: str, **more: str) -> None:
        record.end(status=status, ended_at=datetime.now(UTC).isoformat(), seconds=clock.seconds, **more)

    record.save()
    try:
        yield record
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(StorageError):  # it would hide what ended the run
            end(status, failure=f"{type(error).__name__}: {error}")
        raise
    end("complete" if record.is_complete else "incomplete")


def installed_version(package: str) -> str | None:
    """The version of a package; None where it isn't installed, as ours when run from a working directory."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    versions = {name: installed_version(name) or "not installed" for name in _PACKAGES}
    return {"python": platform.python_version()} | versions
