"""A partition as it lies in storage, read without its model: to compare it, and to report on it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import Manifest
from pipeline.record import read_record
from pipeline.statistics import CLASS_STATS_SCHEMA, HISTOGRAM_BINS, ClassStatistics
from pipeline.storage import BucketNotFound, ObjectNotFound, Storage, StorageError, normalised

_RUN = re.compile(r"(.+)@(latest|previous|\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6})/?")


class NoPreviousRunError(StorageError):
    """There is no run before the last one, to compare that with."""


@dataclass(frozen=True)
class StoredPartition:
    """A partition: its class names, statistics, manifest and records of runs.

    Attributes:
        storage: access to it.
        uri: where it lies, without a slash at the end.
        classes: its class statistics, as `class_stats.parquet` holds them.
    """

    storage: Storage
    uri: str
    classes: pa.Table

    @classmethod
    def open(cls, storage: Storage, uri: str) -> StoredPartition:
        """Finds a partition.

        Raises:
            StorageError: there is none, or it can't be read.
        """
        uri = normalised(uri)
        try:
            content = storage.read(f"{uri}/class_stats.parquet")
        except BucketNotFound:
            raise
        except ObjectNotFound:
            raise StorageError(
                uri,
                "no labels of a model: it has no class_stats.parquet (expected: .../model=NAME-FINGERPRINT)",
            ) from None
        try:
            classes = pq.read_table(io.BytesIO(content)).select(CLASS_STATS_SCHEMA.names)
        except (pa.ArrowInvalid, KeyError) as error:
            raise StorageError(f"{uri}/class_stats.parquet", f"not class statistics: {error}") from None
        return cls(storage, uri, classes)

    @property
    def name(self) -> str:
        """The folder's name: `model=<name>-<fingerprint>`."""
        return self.uri.rpartition("/")[2]

    @cached_property
    def labels(self) -> list[str]:
        """The classes' names, by class id."""
        names: list[str] = self.classes["label"].to_pylist()
        return names

    @property
    def manifest(self) -> Manifest:
        """What is labelled."""
        return Manifest(self.storage, self.uri, len(self.labels))

    def record(self, run: str) -> dict[str, Any] | None:
        """The record of a run; None where there is none.

        Raises:
            StorageError: it can't be read, or is no record.
        """
        return read_record(self.storage, self.uri, run)

    def records(self) -> list[str]:
        """The ids of all runs that left a record, the first first."""
        try:
            found = [info.uri.rpartition("/")[2] for info in self.storage.list(f"{self.uri}/runs")]
        except ObjectNotFound:  # a local folder that isn't there
            return []
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


class StoredShard(NamedTuple):
    """A shard's labels, as the manifest has them.

    Attributes:
        uri, version: of the shard.
        rows, errors: its samples, and those of them that are error rows.
        output: its prediction file, relative to the partition.
    """

    uri: str
    version: str
    rows: int
    errors: int
    output: str

    @property
    def labelled(self) -> int:
        """Its samples that have a label."""
        return self.rows - self.errors


@dataclass(frozen=True)
class Side:
    """What is compared: all labels of a partition, or those that one run wrote and that still stand.

    Attributes:
        partition: whose labels they are.
        run: the run's id; None for all labels.
        statistics: of what that run wrote; folded from the manifest where None.
    """

    partition: StoredPartition
    run: str | None = None
    statistics: ClassStatistics | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, storage: Storage, name: str) -> Side:
        """Finds what is named by `URI`, `URI@RUN`, `URI@latest` or `URI@previous`.

        Raises:
            StorageError: there is no such partition, no such run, or nothing that it labelled still stands.
            NoPreviousRunError: labels of one run alone stand there.
        """
        found = _RUN.fullmatch(name)
        if found is None:
            return cls(StoredPartition.open(storage, name))
        partition = StoredPartition.open(storage, found[1])
        runs, asked = partition.manifest.runs(), found[2]
        if asked in ("latest", "previous"):
            if not runs:
                raise StorageError(partition.uri, "labels of no run stand there")
            if asked == "previous" and len(runs) == 1:
                raise NoPreviousRunError(
                    f"{partition.uri}@previous", f"all labels that stand there are of one run, {runs[0]}"
                )
            return cls(partition, runs[-1 if asked == "latest" else -2])
        if asked not in runs:
            why = (
                "what that run labelled has been labelled again since, or it labelled nothing"
                if partition.record(asked) is not None
                else f"there is no such run; labels stand of {', '.join(runs[-5:]) or 'none'}"
            )
            raise StorageError(f"{partition.uri}@{asked}", why)
        return cls(partition, asked)

    @property
    def name(self) -> str:
        """What it is, for people."""
        return self.partition.uri if self.run is None else f"{self.partition.uri}@{self.run}"

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Images by class, and the histograms of their scores.

        Raises:
            StorageError: they can't be read.
        """
        if self.run is not None:
            stats = self.statistics or self.partition.manifest.fold_statistics(self.run)
            return stats.count, stats.score_histogram
        classes = self.partition.classes
        histograms = classes["score_histogram"].combine_chunks().flatten().to_numpy()
        return classes["count"].to_numpy(), histograms.reshape(-1, HISTOGRAM_BINS)

    def shards(self) -> Iterator[StoredShard]:
        """The shards whose labels they are, sorted by URI, from the manifest. Streams.

        Raises:
            StorageError: the manifest can't be read.
        """
        for table in self.partition.manifest.labelled(StoredShard._fields, self.run):
            yield from map(StoredShard, *(column.to_pylist() for column in table.columns))
