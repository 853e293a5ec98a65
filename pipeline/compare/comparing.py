"""Compares two label sets, or a run and the run before it, by class and sample by sample.

Samples are joined on shard and index, manifests first: only prediction files of shards that both label sets
have, in the same version, are opened, one shard of each at a time in each thread.
"""

import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commit import Partition
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
from pipeline.storage import Storage, StorageError, normalize_uri

_READERS = 16
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
            StorageError: there is no such partition, or no label of that run.
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
        rows = self.partition.manifest.labeled(("uri", "version", "output", "rows", "errors"), self.run)
        labeled = pc.subtract(rows["rows"], rows["errors"])
        return rows.select(["uri", "version", "output"]).append_column("labeled", labeled)


def compare(a: LabelSet, b: LabelSet, with_agreement: bool = True) -> Comparison:
    """Compares two label sets by class and, where they have samples in common, sample by sample.

    Two runs of one partition have no sample in common, since a shard has one set of labels there.

    Raises:
        StorageError: a label set can't be read, or has no labeled image.
    """
    classes = ClassMapping.matched(a.partition.labels, b.partition.labels)
    for label_set in (a, b):
        if not label_set.counts[0].any():
            raise StorageError(label_set.id.name, "nothing to compare: no image is labeled there")
    drift = Drift(classes, a.counts, b.counts)
    agreement = None
    if with_agreement and a.partition.uri != b.partition.uri:
        agreement = measure_agreement(classes, a, b)
    return Comparison(a.id, b.id, drift, agreement)


def compare_labels(
    a: str, b: str, *, with_agreement: bool = True, storage: Storage | None = None
) -> Comparison:
    """Compares the labels of two models, or of two runs.

    Args:
        a: `URI`, `URI@RUN`, `URI@latest` or `URI@previous` of a partition.
        b: the same for the second.
        with_agreement: whether to read all labels and compare them sample by sample.
        storage: access to both; from the environment where None.

    Raises:
        StorageError: a label set can't be found or read, or has no labeled image.
    """
    storage = storage or Storage()
    return compare(LabelSet.open(storage, a), LabelSet.open(storage, b), with_agreement)


def write_comparison(comparison: Comparison, storage: Storage, uri: str) -> None:
    """Writes a comparison as a Parquet file with one row per class."""
    file = io.BytesIO()
    pq.write_table(comparison.table(), file, compression="zstd")
    storage.write(normalize_uri(uri), file.getvalue())


def measure_agreement(classes: ClassMapping, a: LabelSet, b: LabelSet) -> AgreementStatistics:
    """Compares two label sets sample by sample."""
    # Both manifests are read before any label: a run may rewrite them while labels are read, for hours.
    shards = a.shards().join(b.shards(), "uri", join_type="full outer", left_suffix="_a", right_suffix="_b")
    is_common = pc.fill_null(pc.equal(shards["version_a"], shards["version_b"]), False)
    other = shards.filter(pc.invert(is_common))
    result = AgreementStatistics(classes)
    result.only_a = pc.sum(other["labeled_a"]).as_py() or 0
    result.only_b = pc.sum(other["labeled_b"]).as_py() or 0
    result.changed_shards = other.drop_null().num_rows

    def read(shard: Mapping[str, Any]) -> tuple[pa.Table, pa.Table] | None:
        """Labels of a shard in both label sets; None where one has none of this version of the shard now."""
        found = []
        for partition in (a.partition, b.partition):
            uri = f"{partition.uri}/{shard['output_a']}"
            labels = read_predictions(partition.storage, uri, ["index", "label_id"])
            if labels is None or labels[0].version != shard["version_a"]:
                return None
            found.append(labels[1])
        return found[0], found[1]

    with ThreadPoolExecutor(_READERS, thread_name_prefix="compare") as pool:
        for batch in shards.filter(is_common).sort_by("uri").to_batches(4 * _READERS):
            pairs = batch.to_pylist()
            for shard, labels in zip(pairs, pool.map(read, pairs), strict=True):
                if labels is not None:
                    result.add(*labels)
                    continue
                result.only_a += shard["labeled_a"]
                result.only_b += shard["labeled_b"]
                result.changed_shards += 1
    return result


@dataclass(frozen=True)
class RunPair:
    """A run of a dataset, and the last run before it that ended by itself.

    Runs in between were killed or stopped, and the later run completed them: what all of them labeled counts
    as labels of the later run. Only runs count of which the partition still has labels.

    Attributes:
        dataset: URI of the dataset; None where the partition has labels of one dataset only.
        previous: id of the earlier run; None for the first run.
        current: ids of the later run and of the runs that it completed; empty where they labeled nothing.
    """

    partition: Partition
    dataset: str | None
    previous: str | None
    current: Sequence[str]

    @classmethod
    def find(cls, partition: Partition, dataset: str | None, run: str) -> Self:
        """Finds the run before `run`."""
        earlier, current = [each for each in partition.manifest.runs(dataset) if each <= run], list[str]()
        while earlier and (earlier[-1] == run or not _has_ended(partition, earlier[-1])):
            current.insert(0, earlier.pop())
        return cls(partition, dataset, earlier[-1] if earlier else None, current)

    def compare(self) -> tuple[ClassStatistics, Comparison | None]:
        """Class statistics of all labels of the partition, and the comparison of the two runs, in one pass.

        Without a previous run, or where one of the two labeled no image, the comparison is None.
        """
        previous = [] if self.previous is None else [self.previous]
        total, *both = self.partition.manifest.fold_runs(self.dataset, previous, self.current)
        if not all(stats.count.any() for stats in both):
            return total, None
        runs = previous[0], self.current[-1]
        a, b = (LabelSet(self.partition, run, stats) for run, stats in zip(runs, both, strict=True))
        return total, compare(a, b, with_agreement=False)


def _has_ended(partition: Partition, run: str) -> bool:
    record = partition.record(run)
    return record is None or record.get("status") in ("complete", "incomplete")
