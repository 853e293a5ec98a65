"""The record of a run: its configuration and selection, versions, counts, timings and outcome.

It also lists what no prediction file holds, such as unreadable shards. A run can be repeated from its record.
"""

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime

from pipeline.commit import RunRecord
from pipeline.config import Selection
from pipeline.run.job import Job
from pipeline.storage import StorageError

_PACKAGES = (
    "cvt-label", "ray", "torch", "torchvision", "openvino", "transformers", "pyarrow", "pillow", "numpy",
    "boto3",
)  # fmt: skip


class Clock:
    """Seconds from the start to each event."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, event: str, *, again: bool = False) -> None:
        """Notes an event's time; the first one counts, unless it may happen `again`."""
        if again or event not in self.seconds:
            self.seconds[event] = round(time.monotonic() - self._start, 3)


@contextmanager
def recorded(job: Job, run: str, clock: Clock, selection: Selection) -> Iterator[RunRecord]:
    """Keeps `runs/<run id>.json`: written at once, so that a run that dies leaves a trace, and at the end."""
    versions = {name: installed_version(name) or "not installed" for name in _PACKAGES}
    values = {
        "run": run,
        "status": "running",
        "started_at": datetime.now(UTC).isoformat(),
        "config": job.config.model_dump(),
        "selection": asdict(selection),
        "fingerprint": job.fingerprint,
        "model_digest": job.checkpoint.digest,
        "model_commit": job.checkpoint.commit,
        "versions": {"python": platform.python_version()} | versions,
    }
    record = RunRecord(job.partition.storage, f"{job.partition.uri}/runs/{run}.json", values)

    record.save()
    try:
        yield record
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(StorageError):  # it would hide what ended the run
            record.end(status=status, seconds=clock.seconds, failure=f"{type(error).__name__}: {error}")
        raise
    record.end(status="incomplete" if record.values["unreadable"] else "complete", seconds=clock.seconds)


def installed_version(package: str) -> str | None:
    """The version of a package; None where it isn't installed, as ours when run from a working directory."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
