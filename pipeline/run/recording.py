"""The common state of the steps of a run: phases, result and run record."""

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import pyarrow as pa

from pipeline.commit import Lease, ManifestRow, ManifestWriter, Partition, Progress, RunRecord, Totals
from pipeline.config import Selection
from pipeline.report import Gallery
from pipeline.run.copied_rows import Source
from pipeline.run.failures import FailureMonitor
from pipeline.run.job import Job
from pipeline.run.planning import Plan, PreparedRun
from pipeline.statistics import ClassStatistics
from pipeline.storage import StorageError, retry_counts
from pipeline.text import remove_secrets

_PACKAGES = (
    "cvt-label", "ray", "torch", "torchvision", "openvino", "transformers", "pyarrow", "pillow", "numpy",
    "boto3", "cykooz-resizer",
)  # fmt: skip


class Phase(StrEnum):
    """The activity of a run before the first result and after the last one."""

    LISTING = "listing the input"
    LOADING_MODEL = "loading the model"
    PLANNING = "planning"
    STARTING_RAY = "starting Ray"
    CONNECTING_TO_RAY = "connecting to Ray"
    STARTING_STAGES = "starting the stages"  # until the first result; classifiers load the model
    SUMMARIZING = "writing statistics and report"


@dataclass
class RunResult:
    """The result of a run.

    Attributes:
        rolled_back: groups of image files whose labels the run removed again: other groups have the images.
            Also the parts of files whose labels the labels of the whole file have replaced.
        statistics: class statistics of all labels in the partition; None if the run changed nothing.
        timings: seconds from the start of the run to each event, by name: `checkpoint_opened`, `planned`,
            `model_loaded`, `executor_ready`, `first_result`, `first_commit`, `last_result`,
            `executor_stopped`, `summarized`, `ended`.
        throughput: `images_per_s`, `stages`, `bound_by`, `gpu_utilization` and `decoder` of the run record;
            empty if there was nothing to label.
        broken_limits: messages about limits of the gate on drift that the labels break.
        broken_failure_limits: messages about limits on errors and unreadable shards that the run breaks.
        aborted: whether the gate stopped the run before all shards were labeled.
    """

    run: str
    job: Job
    plan: Plan
    totals: Totals = field(default_factory=Totals)
    rolled_back: set[str] = field(default_factory=set)
    statistics: ClassStatistics | None = None
    timings: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)
    broken_limits: list[str] = field(default_factory=list)
    broken_failure_limits: list[str] = field(default_factory=list)
    aborted: bool = False

    @property
    def partition(self) -> Partition:
        """The partition that holds the labels."""
        return self.job.partition

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the input is labeled in its current version, to its end."""
        failed = self.totals.unreadable or self.totals.damaged
        return not (self.aborted or failed or self.plan.skipped or self.plan.damaged)


@dataclass
class RunContext:
    """State that the steps of a run share.

    Attributes:
        retries_before: `retry_counts` at the start of the run.
        groups: manifest rows of the groups of image files and the parts of files that this run labeled.
        outputs: versions of all prediction files that this run wrote, by path in the partition.
        held: columns to copy of prediction files that the run removed.
    """

    result: RunResult
    prepared: PreparedRun
    record: RunRecord
    lease: Lease
    writer: ManifestWriter
    on_progress: Callable[[Progress, PreparedRun], None]
    on_phase: Callable[[Phase], None]
    retries_before: Counter[str]
    gallery: Gallery = field(init=False)
    failures: FailureMonitor = field(init=False)
    groups: dict[str, ManifestRow] = field(default_factory=dict)
    outputs: dict[str, str | None] = field(default_factory=dict)
    held: dict[Source, pa.Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, plan = self.result.job.config, self.result.plan
        self.gallery = Gallery(config.report.gallery, plan.shards)
        entries = self.prepared.repairs.entries
        self.failures = FailureMonitor(config.gate, plan.shards, entries, plan.copied)

    def retries(self) -> Counter[str]:
        """Returns the number of retried storage operations of this process and of workers, by failure."""
        return retry_counts() - self.retries_before + self.result.totals.retries

    def record_counts(self) -> None:
        """Sets in the run record how many shards and images the run has committed so far."""
        totals = self.result.totals
        counts = {
            "shards": totals.shards,
            "unreadable_shards": len(totals.unreadable),
            "damaged_shards": len(totals.damaged),
            "images": totals.images,
            "errors": totals.errors,
            "duplicate_keys": totals.duplicate_keys,
            "unmatched_targets": totals.unmatched.count,
            "merged_images": totals.merged_images,
            "pruned_shards": len(self.result.plan.to_prune),
        }
        self.record.set(
            counts=counts,
            causes=totals.causes.to_record(),
            unmatched_targets=totals.unmatched.to_record(),
            aborted=self.result.aborted,
            storage_retries=dict(self.retries()),
        )


@contextmanager
def run_record(job: Job, run: str, start: float, selection: Selection) -> Iterator[RunRecord]:
    """Writes `runs/<run id>.json` at the start, so that a run that dies leaves a record, and at the end."""
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
    record = RunRecord(job.partition.storage, f"{job.partition.uri}/runs/{run}.json", start, values)
    record.save()
    try:
        yield record
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record.set(status=status, error=remove_secrets(f"{type(error).__name__}: {error}"))
        with suppress(StorageError):  # it would hide the exception that ended the run
            record.save_end()
        raise
    record.save_end()


def installed_version(package: str) -> str | None:
    """Returns the version of a package; None if it is not installed, as this project in its own folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
