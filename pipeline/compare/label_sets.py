"""Compares two label sets by class and sample by sample, and a run with the previous run.

Samples are joined on shard and index, for the shards that both label sets have in the same version.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.config import InputUris, Share
from pipeline.predictions import read_predictions
from pipeline.statistics import (
    HISTOGRAM_BINS,
    AgreementStatistics,
    ClassMapping,
    ClassStatistics,
    Comparison,
    Drift,
    LabelSetId,
)
from pipeline.storage import Storage, StorageError, map_in_threads

_LABELS_OF_RUN = re.compile(r"(.+)@(latest|previous|\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6})/?")


class NoPreviousRunError(StorageError):
    """The partition has labels of one run only."""


@dataclass(frozen=True)
class LabelSet:
    """All labels of a partition, or the labels of one run that no later run replaced.

    Attributes:
        run: id of the run; None for all labels.
        statistics: class statistics of these labels. If None, they are read from the partition.
    """

    partition: Partition
    run: str | None = None
    statistics: ClassStatistics | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, storage: Storage, name: str) -> Self:
        """Opens the label set named `URI`, `URI@RUN`, `URI@latest` or `URI@previous`.

        Raises:
            StorageError: the partition does not exist, or has no labels of the run.
            NoPreviousRunError: the partition has labels of one run only.
        """
        match = _LABELS_OF_RUN.fullmatch(name)
        if match is None:
            return cls(Partition.open(storage, name))
        partition, run = Partition.open(storage, match[1]), match[2]
        runs = partition.manifest.runs()
        if run in runs:
            return cls(partition, run)
        if run not in ("latest", "previous") or not runs:
            last_runs = ", ".join(runs[-5:]) or "none"
            raise StorageError(
                f"{partition.uri}@{run}", f"no labels of this run; runs with labels: {last_runs}"
            )
        if run == "previous" and len(runs) == 1:
            raise NoPreviousRunError(f"{partition.uri}@previous", f"all labels are of one run, {runs[0]}")
        return cls(partition, runs[-1 if run == "latest" else -2])

    @property
    def id(self) -> LabelSetId:
        """The partition's URI and the run."""
        return LabelSetId(self.partition.uri, self.run)

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Images per class, int64 (classes,), and score histograms per class, int64 (classes, bins)."""
        stats = self.statistics
        if stats is None and self.run is not None:
            stats = self.partition.manifest.fold_statistics(self.run)
        if stats is not None:
            return stats.count, stats.score_histogram
        classes = self.partition.class_table
        histograms = classes["score_histogram"].combine_chunks().flatten().to_numpy()
        return classes["count"].to_numpy(), histograms.reshape(-1, HISTOGRAM_BINS)

    def shards(self) -> pa.Table:
        """Returns the labeled shards: `uri`, `version`, `output` (prediction file), `labeled` (images)."""
        rows = self.partition.manifest.labeled(("uri", "version", "output", "rows", "errors"), self.run)
        labeled = pc.subtract(rows["rows"], rows["errors"])
        return rows.select(["uri", "version", "output"]).append_column("labeled", labeled)


def compare_label_sets(a: LabelSet, b: LabelSet, with_agreement: bool = True) -> Comparison:
    """Compares two label sets by class and, if they have common samples, sample by sample.

    Two runs of one partition have no common samples, because each shard has one set of labels there.

    Raises:
        StorageError: a label set cannot be read or has no labeled image.
    """
    classes = ClassMapping.matched(a.partition.labels, b.partition.labels)
    for label_set in (a, b):
        if not label_set.counts[0].any():
            raise StorageError(label_set.id.name, "cannot compare: the label set has no labeled image")
    drift = Drift(classes, a.counts, b.counts)
    agreement = None
    if with_agreement and a.partition.uri != b.partition.uri:
        agreement = measure_agreement(classes, a, b)
    return Comparison(a.id, b.id, drift, agreement)


def compare_labels(
    a: str, b: str, *, with_agreement: bool = True, storage: Storage | None = None
) -> Comparison:
    """Compares the labels of two models or of two runs.

    Args:
        a: the first label set: `URI`, `URI@RUN`, `URI@latest` or `URI@previous` of a partition.
        b: the second label set, in the same form.
        with_agreement: whether to read all labels and compare them sample by sample.
        storage: access to both label sets. If None, settings come from the environment.

    Raises:
        StorageError: a label set does not exist, cannot be read, or has no labeled image.
    """
    storage = storage or Storage()
    return compare_label_sets(LabelSet.open(storage, a), LabelSet.open(storage, b), with_agreement)


def measure_agreement(classes: ClassMapping, a: LabelSet, b: LabelSet) -> AgreementStatistics:
    """Compares two label sets sample by sample."""
    # Both manifests are read before the labels. Reading labels may take hours, and a run may rewrite the
    # manifests meanwhile.
    shards = a.shards().join(b.shards(), "uri", join_type="full outer", left_suffix="_a", right_suffix="_b")
    is_common = pc.fill_null(pc.equal(shards["version_a"], shards["version_b"]), False)
    not_common = shards.filter(pc.invert(is_common))
    result = AgreementStatistics(classes)
    result.only_a = pc.sum(not_common["labeled_a"]).as_py() or 0
    result.only_b = pc.sum(not_common["labeled_b"]).as_py() or 0
    result.changed_shards = not_common.drop_null().num_rows

    def read(shard: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[pa.Table]]:
        """Returns a shard, and its labels in each label set that still has this version of the shard."""
        tables = []
        for partition in (a.partition, b.partition):
            uri = f"{partition.uri}/{shard['output_a']}"
            labels = read_predictions(partition.storage, uri, ["index", "label_id"])
            if labels is not None and labels[0].version == shard["version_a"]:
                tables.append(labels[1])
        return shard, tables

    batches = shards.filter(is_common).sort_by("uri").to_batches(1000)  # in memory as Python objects
    for shard, tables in map_in_threads(read, (row for batch in batches for row in batch.to_pylist())):
        if len(tables) == 2:
            result.add(*tables)
            continue
        result.only_a += shard["labeled_a"]
        result.only_b += shard["labeled_b"]
        result.changed_shards += 1
    return result


@dataclass(frozen=True)
class RunPair:
    """A run of a dataset, and the last run before it that ended normally.

    Runs between the two were killed or stopped, and the later run completed them. All labels of these runs
    count as labels of the later run. Runs without labels in the partition, and runs of other shares of the
    dataset, are ignored.

    Attributes:
        dataset: the input of the dataset. None if the partition has labels of one dataset only.
        previous: id of the earlier run. None for the first run.
        current: ids of the later run and of the runs that it completed. Empty if they labeled nothing.
    """

    partition: Partition
    dataset: InputUris | None
    previous: str | None
    current: Sequence[str]

    @classmethod
    def find(cls, partition: Partition, dataset: InputUris | None, run: str) -> Self:
        """Finds the run before `run`."""
        share, current = Share.of_record(partition.record(run)), list[str]()
        runs = [each for each in partition.manifest.runs(dataset) if each <= run][::-1]
        for each, record in zip(runs, map_in_threads(partition.record, runs, threads=8), strict=True):
            if not share.overlaps(Share.of_record(record)):
                continue
            if each != run and record.get("status", "complete") in ("complete", "incomplete"):
                return cls(partition, dataset, each, current)
            current.insert(0, each)
        return cls(partition, dataset, None, current)

    def fold_statistics(self) -> tuple[ClassStatistics, Comparison | None]:
        """Computes the class statistics of all labels of the partition, and compares the two runs.

        Reads the manifest once. The comparison is None if there is no previous run, or if one of the runs
        labeled no image.
        """
        previous = [] if self.previous is None else [self.previous]
        total, *both = self.partition.manifest.fold_runs(self.dataset, previous, self.current)
        if not all(stats.count.any() for stats in both):
            return total, None
        runs = previous[0], self.current[-1]
        a, b = (LabelSet(self.partition, run, stats) for run, stats in zip(runs, both, strict=True))
        return total, compare_label_sets(a, b, with_agreement=False)
