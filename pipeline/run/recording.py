"""What the steps of a run share, its result, and its record.

The record holds configuration and selection, versions, counts, timings and outcome, so that a run can be
repeated from it. It also lists what no prediction file holds, such as unreadable shards.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from pipeline.commit import Lease, ManifestRow, ManifestWriter, Partition, Progress, RunRecord, Totals
from pipeline.config import Selection
from pipeline.read import Shard, list_shards
from pipeline.report import Gallery
from pipeline.run.job import Job
from pipeline.run.planning import Plan, PreparedRun
from pipeline.statistics import ClassStatistics, StageSummary
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

    def mark(self, event: str) -> None:
        """Notes the time at which an event happens first."""
        self.seconds.setdefault(event, round(time.monotonic() - self._start, 3))


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        run: its id.
        totals: what it committed.
        rolled_back: groups of image files whose labels it removed again, since its input has changed.
        statistics: class statistics over all labels of the partition; None where the run changed nothing.
        timings: seconds from its start to each event, by name.
        stages: each stage's part in it; empty where nothing was to be labeled.
        decoder: what decoded the images, in words.
        broken_limits: of the configured gate, in words.
    """

    run: str
    job: Job
    plan: Plan
    totals: Totals = field(default_factory=Totals)
    rolled_back: set[str] = field(default_factory=set)
    statistics: ClassStatistics | None = None
    timings: dict[str, float] = field(default_factory=dict)
    stages: dict[str, StageSummary] = field(default_factory=dict)
    decoder: str = ""
    broken_limits: list[str] = field(default_factory=list)

    @property
    def partition(self) -> Partition:
        """Where the labels are."""
        return self.job.partition

    @property
    def pruned(self) -> int:
        """Deleted shards whose labels the run removed."""
        return len(self.plan.to_prune)

    @property
    def rate(self) -> float:
        """Samples a second, from the start of the dataflow to its last result."""
        if "last_result" not in self.timings:
            return 0.0
        return self.totals.images / max(self.timings["last_result"] - self.timings["executor_ready"], 1e-9)

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the input is labeled, as it is now."""
        return not self.totals.unreadable and not self.plan.skipped_failures


@dataclass
class RunContext:
    """What the steps of a run share.

    Attributes:
        gallery: thumbnails of labeled shards.
        groups: manifest rows of the groups of image files that were labeled, by URI.
    """

    result: RunResult
    prepared: PreparedRun
    record: RunRecord
    clock: Clock
    lease: Lease
    writer: ManifestWriter
    on_progress: Callable[[Progress, PreparedRun], None]
    gallery: Gallery = field(init=False)
    groups: dict[str, ManifestRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gallery = Gallery(self.result.job.config.report.gallery, self.result.plan.shards)

    def relist(self) -> Iterator[Shard]:
        """Lists the input as it is now; for what only overlapping runs make necessary."""
        section = self.result.job.config.input
        return list_shards(self.result.job.storage, section.uri, section.format)

    def note_counts(self) -> None:
        """Notes in the record how many shards and images the run has committed so far."""
        totals = self.result.totals
        counts = {
            "shards": totals.shards,
            "unreadable_shards": len(totals.unreadable),
            "images": totals.images,
            "errors": totals.errors,
            "duplicate_keys": totals.duplicate_keys,
            "pruned_shards": self.result.pruned,
        }
        self.record.note(counts=counts, causes=totals.causes.to_record())


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
            record.end(status=status, timings=clock.seconds, error=f"{type(error).__name__}: {error}")
        raise
    record.end(status="incomplete" if record.values["unreadable"] else "complete", timings=clock.seconds)


def installed_version(package: str) -> str | None:
    """The version of a package; None where it isn't installed, as ours when run from a working directory."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
