"""A partition as it lies in storage, read without its model: to compare it, and to report on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipeline.commit import Partition
from pipeline.statistics import HISTOGRAM_BINS, ClassStatistics, LabelSetId
from pipeline.storage import Storage, StorageError

_RUN = re.compile(r"(.+)@(latest|previous|\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6})/?")


class NoPreviousRunError(StorageError):
    """There is no run before the last one, to compare that with."""


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

    partition: Partition
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
            return cls(Partition.open(storage, name))
        partition = Partition.open(storage, found[1])
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
    def id(self) -> LabelSetId:
        """The partition's URI and the run."""
        return LabelSetId(self.partition.uri, self.run)

    @property
    def name(self) -> str:
        """`URI` or `URI@RUN`."""
        return self.id.name

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Images by class, and the histograms of their scores.

        Raises:
            StorageError: they can't be read.
        """
        if self.run is not None:
            stats = self.statistics or self.partition.manifest.fold_statistics(self.run)
            return stats.count, stats.score_histogram
        classes = self.partition.class_table
        histograms = classes["score_histogram"].combine_chunks().flatten().to_numpy()
        return classes["count"].to_numpy(), histograms.reshape(-1, HISTOGRAM_BINS)

    def shards(self) -> Iterator[StoredShard]:
        """The shards whose labels they are, sorted by URI, from the manifest. Streams.

        Raises:
            StorageError: the manifest can't be read.
        """
        for table in self.partition.manifest.labelled(StoredShard._fields, self.run):
            yield from map(*(column.to_pylist() for column in table.columns))
