"""What is compared: all labels of a partition, or the labels that one run wrote."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.statistics import HISTOGRAM_BINS, ClassStatistics, LabelSetId
from pipeline.storage import Storage, StorageError

_RUN = re.compile(r"(.+)@(latest|previous|\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6})/?")


class NoPreviousRunError(StorageError):
    """All labels of the partition are of one run."""


@dataclass(frozen=True)
class LabelSet:
    """All labels of a partition, or the labels that one run wrote and that no later run replaced.

    Attributes:
        run: the run's id; None for all labels.
        statistics: class statistics of these labels; read from the partition where None.
    """

    partition: Partition
    run: str | None = None
    statistics: ClassStatistics | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, storage: Storage, name: str) -> Self:
        """Opens the label set named `URI`, `URI@RUN`, `URI@latest` or `URI@previous`.

        Raises:
            StorageError: there is no such partition, no such run, or no label of that run.
            NoPreviousRunError: the partition has labels of one run only.
        """
        found = _RUN.fullmatch(name)
        if found is None:
            return cls(Partition.open(storage, name))
        partition, run = Partition.open(storage, found[1]), found[2]
        runs = partition.manifest.runs()
        if run in runs:
            return cls(partition, run)
        if run not in ("latest", "previous") or not runs:
            cause = f"there are no labels of this run, but of {', '.join(runs[-5:]) or 'no run'}"
            raise StorageError(f"{partition.uri}@{run}", cause)
        if run == "previous" and len(runs) == 1:
            raise NoPreviousRunError(f"{partition.uri}@previous", f"all labels are of one run, {runs[0]}")
        return cls(partition, runs[-1 if run == "latest" else -2])

    @property
    def id(self) -> LabelSetId:
        """The partition's URI and the run."""
        return LabelSetId(self.partition.uri, self.run)

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Images of each class, int64 (classes,), and histograms of their scores, int64 (classes, bins)."""
        stats = self.statistics
        if stats is None and self.run is not None:
            stats = self.partition.manifest.fold_statistics(self.run)
        if stats is not None:
            return stats.count, stats.score_histogram
        classes = self.partition.class_table
        histograms = classes["score_histogram"].combine_chunks().flatten().to_numpy()
        return classes["count"].to_numpy(), histograms.reshape(-1, HISTOGRAM_BINS)

    def shards(self) -> pa.Table:
        """The labeled shards: `uri`, `version`, `output` (prediction file), `labeled` (number of images)."""
        rows = self.partition.manifest.labelled(("uri", "version", "output", "rows", "errors"), self.run)
        labeled = pc.subtract(rows["rows"], rows["errors"])
        return rows.select(["uri", "version", "output"]).append_column("labeled", labeled)
