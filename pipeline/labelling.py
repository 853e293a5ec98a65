"""One run of the labelling job, from configuration to run record.

It hands each part what it needs, and holds no logic of theirs: listing, dataflow and commit are elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.classifying import PredictionOptions
from pipeline.committing import Committer, Progress
from pipeline.config import Config, ConfigError, InputConfig, StorageConfig
from pipeline.manifest import ManifestRow, fold_statistics, read_manifest, write_manifest
from pipeline.reading import ReadOptions
from pipeline.report import render_report
from pipeline.shards import Shard, list_shards
from pipeline.statistics import ClassStatistics, class_table
from pipeline.storage import Storage, StorageError, normalised

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint

_PACKAGES = ("cvt-label", "ray", "torch", "transformers", "pyarrow", "pillow", "numpy", "boto3")


class NoShardsError(ValueError):
    """The input has nothing to label."""


@dataclass(frozen=True)
class Partition:
    """The output of one model with one set of options, and how to reach it.

    Attributes:
        config: the job's configuration.
        storage: access to input and output.
        checkpoint: the model, loaded.
        fingerprint: hash over everything that decides a label, in hexadecimal.
    """

    config: Config
    storage: Storage
    checkpoint: Checkpoint
    fingerprint: str

    @property
    def uri(self) -> str:
        """Where it lies, without a slash at the end."""
        return f"{normalised(self.config.output.uri)}/model={self.checkpoint.name}-{self.fingerprint[:8]}"

    @property
    def manifest_uri(self) -> str:
        """Where its manifest lies."""
        return f"{self.uri}/manifest.parquet"

    @property
    def prediction_options(self) -> PredictionOptions:
        """What the prediction columns are."""
        return PredictionOptions(
            labels=self.checkpoint.labels,
            topk=self.config.output.topk,
            embedding=self.config.output.embedding,
            embedding_width=self.checkpoint.embedding_width,
        )

    def class_table(self, stats: ClassStatistics) -> pa.Table:
        """Statistics as `class_stats.parquet` holds them."""
        return class_table(stats, self.checkpoint.labels, self.config.output.topk)


@dataclass(frozen=True)
class Plan:
    """What a run is to do, found out without doing it.

    Attributes:
        partition: where the labels go.
        shards: what is to be labelled.
        ignored: objects under the input URI that are no shard.
    """

    partition: Partition
    shards: list[Shard]
    ignored: int

    @cached_property
    def images(self) -> int | None:
        """Images in all, where the listing tells: of loose images only."""
        if not all(shard.members for shard in self.shards):
            return None
        return sum(len(shard.members) for shard in self.shards)


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        run: its id.
        plan: what it was to do.
        rows: the manifest rows of the shards that it has done.
        statistics: the class statistics over everything that the partition holds.
        timings: seconds from its start to each event, by name.
    """

    run: str
    plan: Plan
    rows: dict[str, ManifestRow]
    statistics: ClassStatistics
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Samples that came out, error rows included."""
        return sum(row.rows or 0 for row in self.rows.values())

    @property
    def errors(self) -> int:
        """Samples that are error rows."""
        return sum(row.errors or 0 for row in self.rows.values())

    @property
    def rate(self) -> float:
        """Samples a second, from the start of the dataflow to its last result."""
        seconds = self.timings["last_result"] - self.timings["ray_ready"]
        return self.images / max(seconds, 1e-9)

    @property
    def unreadable(self) -> list[ManifestRow]:
        """The shards that couldn't be read."""
        return [row for row in self.rows.values() if row.error is not None]

    @property
    def top5_accuracy(self) -> float | None:
        """Over all rows with targets; None without them, or where the rows hold too few classes."""
        return self.statistics.top5_accuracy(self.plan.partition.config.output.topk)

    @property
    def class_table(self) -> pa.Table:
        """The class statistics as `class_stats.parquet` holds them."""
        return self.plan.partition.class_table(self.statistics)


def open_partition(config: Config) -> Partition:
    """Loads the model, and finds where its labels go; neither input nor output is touched.

    Raises:
        CheckpointError: the model can't be loaded.
        ConfigError: an option doesn't fit the model.
    """
    from cvt.checkpoints import load_checkpoint  # takes seconds, of which listing needs none

    checkpoint = load_checkpoint(config.model.path, config.model.revision)
    if config.output.topk > len(checkpoint.labels):
        raise ConfigError(
            f"output.topk: {config.output.topk} is more than the model's {len(checkpoint.labels)} classes"
        )
    return Partition(config, make_storage(config.storage), checkpoint, _fingerprint(config, checkpoint))


def make_storage(section: StorageConfig) -> Storage:
    """The storage that the configuration describes."""
    return Storage(endpoint_url=section.endpoint_url, region=section.region)


def make_plan(config: Config) -> Plan:
    """Lists the input and loads the model; nothing is written, and Ray is not needed.

    Raises:
        StorageError: the input can't be listed.
        NoShardsError: nothing there is a shard.
        ConfigError: the output lies in the input.
        CheckpointError, ConfigError: as `open_partition`.
    """
    # The input first: it answers at once, and loading a model takes seconds.
    source, target = normalised(config.input.uri), normalised(config.output.uri)
    if f"{target}/".startswith(f"{source}/"):
        raise ConfigError(f"output.uri: {target} lies in the input, {source}: labels would be read as shards")
    shards, ignored = input_shards(make_storage(config.storage), config.input)
    return Plan(open_partition(config), shards, ignored)


def input_shards(storage: Storage, section: InputConfig) -> tuple[list[Shard], int]:
    """The shards of an input, and how many objects there are none.

    Raises:
        StorageError: the input can't be listed.
        NoShardsError: nothing there is a shard.
    """
    listing = list_shards(storage, section.uri, section.format)
    shards = list(listing)
    if not shards:
        others = f" ({listing.ignored} objects there are none)" if listing.ignored else ""
        raise NoShardsError(
            f"{section.uri}: no shards found{others}; expected .tar, .tar.gz or .parquet objects, or images"
        )
    return shards, listing.ignored


def read_options(section: InputConfig, labels: Sequence[str]) -> ReadOptions:
    """What readers need to know of the input, and of the model's classes.

    Of classes that share a name, as ImageNet's two cranes do, none is told by it.
    """
    times = Counter(labels)
    return ReadOptions(
        labels=section.labels,
        label_field=section.label_field,
        image_column=section.image_column,
        label_column=section.label_column,
        key_column=section.key_column,
        class_ids=tuple((name, i) for i, name in enumerate(labels) if times[name] == 1),
        num_labels=len(labels),
        max_image_bytes=section.max_image_bytes,
    )


def _fingerprint(config: Config, checkpoint: Checkpoint) -> str:
    """SHA-256 over what decides a row: not where it is read, nor how the work is spread."""
    decides = {
        "checkpoint": checkpoint.digest,
        "precision": config.model.precision,
        "output": config.output.model_dump(exclude={"uri"}),
        "input": config.input.model_dump(exclude={"uri", "format"}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def run_labelling(
    config: Config, on_progress: Callable[[Progress, Plan], None] = lambda progress, plan: None
) -> RunResult:
    """Labels every shard of the input, and writes predictions, manifest, statistics and report.

    Args:
        config: the job's configuration.
        on_progress: called when results have come in, from the thread that calls this.

    Raises:
        StorageError: input can't be listed, or output can't be written.
        NoShardsError, CheckpointError, ConfigError: as `make_plan`.
        ConnectionError: no Ray cluster answers.
    """
    from pipeline.cluster import ray_cluster

    clock = _Clock()
    plan = make_plan(config)
    clock.mark("planned")
    partition = plan.partition
    with _recorded(plan, clock) as record:
        committer = Committer(
            partition.storage,
            partition.uri,
            plan.shards,
            partition.fingerprint,
            partition.prediction_options,
            record["run"],
        )
        try:
            with ray_cluster(config.ray.address), committer:
                # Ray is imported only now, when its environment is set.
                from pipeline.dataflow import cluster_resources, label_chunks

                resources = cluster_resources(config)
                record["resources"] = asdict(resources)
                clock.mark("ray_ready")
                chunks = label_chunks(
                    plan.shards,
                    partition.storage,
                    read_options(config.input, partition.checkpoint.labels),
                    partition.checkpoint,
                    partition.prediction_options,
                    config,
                    resources,
                )
                with closing(chunks):
                    for chunk in chunks:
                        clock.mark("first_result")
                        committer.add(chunk)
                        on_progress(committer.progress(), plan)
                clock.mark("last_result", again=True)
                committer.finish()
                on_progress(committer.progress(), plan)
        except BaseException:
            with suppress(StorageError):  # it would hide what ended the run
                _update_manifest(partition, committer.rows)
            raise
        finally:
            record["counts"] = _counts(committer.rows)
            record["unreadable"] = {r.uri: r.error for r in committer.rows.values() if r.error is not None}
        manifest = _update_manifest(partition, committer.rows)
        stats = fold_statistics(manifest, len(partition.checkpoint.labels))
        result = RunResult(record["run"], plan, committer.rows, stats, clock.seconds)
        _publish(result)
        clock.mark("published")
    return result


def _counts(rows: dict[str, ManifestRow]) -> dict[str, int]:
    return {
        "shards": len(rows),
        "unreadable_shards": sum(row.error is not None for row in rows.values()),
        "images": sum(row.rows or 0 for row in rows.values()),
        "errors": sum(row.errors or 0 for row in rows.values()),
        "duplicate_keys": sum(row.duplicate_keys or 0 for row in rows.values()),
    }


def _update_manifest(partition: Partition, rows: dict[str, ManifestRow]) -> dict[str, ManifestRow]:
    """Writes the manifest with this run's shards in it; returns its rows."""
    manifest = read_manifest(partition.storage, partition.manifest_uri)
    for uri, row in rows.items():
        before = manifest.get(uri)
        if row.error is not None and before is not None and before.output is not None:
            # Its labels of an earlier run are still there, and so are their statistics.
            row = replace(before, error=row.error)
        manifest[uri] = row
    write_manifest(partition.storage, partition.manifest_uri, manifest.values())
    return manifest


def _publish(result: RunResult) -> None:
    """Writes class statistics and report."""
    partition, storage = result.plan.partition.uri, result.plan.partition.storage
    out = io.BytesIO()
    pq.write_table(result.class_table, out, compression="zstd")
    storage.write(f"{partition}/class_stats.parquet", out.getvalue())
    storage.write(f"{partition}/report.html", render_report(result).encode())


class _Clock:
    """Seconds from the start to each event."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    def mark(self, event: str, *, again: bool = False) -> None:
        """Notes an event's time; the first one counts, unless it may happen `again`."""
        if again or event not in self.seconds:
            self.seconds[event] = round(time.monotonic() - self._start, 3)


@contextmanager
def _recorded(plan: Plan, clock: _Clock) -> Iterator[dict[str, Any]]:
    """Keeps `runs/<run id>.json`: written at once, so that a run that dies leaves a trace, and at
    the end, with how it ended.
    """
    started = datetime.now(UTC)
    run = f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    partition = plan.partition
    uri = f"{partition.uri}/runs/{run}.json"
    record: dict[str, Any] = {
        "run": run,
        "status": "running",
        "started_at": started.isoformat(),
        "config": partition.config.model_dump(),
        "fingerprint": partition.fingerprint,
        "model_digest": partition.checkpoint.digest,
        "planned_shards": len(plan.shards),
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
