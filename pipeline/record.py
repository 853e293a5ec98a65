"""The record of a run: its configuration, versions, counts, timings, and how it ended."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from pipeline.partition import Partition
from pipeline.storage import StorageError

_PACKAGES = ("cvt-label", "ray", "torch", "transformers", "pyarrow", "pillow", "numpy", "boto3")


class Clock:
    """Seconds from the start to each event."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, event: str, *, again: bool = False) -> None:
        """Notes an event's time; the first one counts, unless it may happen `again`."""
        if again or event not in self.seconds:
            self.seconds[event] = round(time.monotonic() - self._start, 3)


def new_run_id() -> str:
    """An id that sorts by time, and that no other run has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@contextmanager
def recorded(partition: Partition, run: str, clock: Clock) -> Iterator[dict[str, Any]]:
    """Keeps `runs/<run id>.json`: written at once, so that a run that dies leaves a trace, and at
    the end, with how it ended.
    """
    uri = f"{partition.uri}/runs/{run}.json"
    record: dict[str, Any] = {
        "run": run,
        "status": "running",
        "started_at": datetime.now(UTC).isoformat(),
        "config": partition.config.model_dump(),
        "fingerprint": partition.fingerprint,
        "model_digest": partition.checkpoint.digest,
        "versions": _versions(),
    }

    def write(status: str) -> None:
        record.update(status=status, ended_at=datetime.now(UTC).isoformat(), seconds=clock.seconds)
        partition.storage.write(uri, json.dumps(record, indent=2).encode())

    partition.storage.write(uri, json.dumps(record, indent=2).encode())
    try:
        yield record
    except BaseException as error:
        record["failure"] = f"{type(error).__name__}: {error}"
        with suppress(StorageError):  # it would hide what ended the run
            write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    write("incomplete" if record["unreadable"] else "complete")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a working directory
            versions[package] = "not installed"
    return versions
