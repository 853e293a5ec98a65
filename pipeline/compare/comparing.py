"""Compares two label sets, and writes a comparison to a file."""

from __future__ import annotations

import io
from collections.abc import Callable

import pyarrow.parquet as pq

from pipeline.compare.agreement import measure_agreement
from pipeline.compare.label_set import LabelSet
from pipeline.statistics import Classes, Comparison, Drift
from pipeline.storage import Storage, StorageError


def compare(
    a: LabelSet,
    b: LabelSet,
    with_agreement: bool = True,
    on_progress: Callable[[int], None] = lambda shards: None,
) -> Comparison:
    """Compares two label sets by class and, where they have samples in common, sample by sample.

    Two runs of one partition have no sample in common, since a shard has one set of labels there.

    Args:
        a: first label set.
        b: second label set.
        with_agreement: whether to read all labels and compare them sample by sample.
        on_progress: called with the number of shards compared so far.

    Raises:
        StorageError: a label set can't be read, or has no labeled image.
    """
    classes = Classes.matched(a.partition.labels, b.partition.labels)
    for label_set in (a, b):
        if not label_set.counts[0].any():
            raise StorageError(label_set.id.name, "nothing to compare: no image is labeled there")
    drift = Drift(classes, a.counts, b.counts)
    agreement = None
    if with_agreement and a.partition.uri != b.partition.uri:
        agreement = measure_agreement(classes, a, b, on_progress)
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
    """Writes a comparison as a Parquet file with one row per class.

    Raises:
        StorageError: the file can't be written.
    """
    file = io.BytesIO()
    pq.write_table(comparison.table(), file, compression="zstd")
    storage.write(uri, file.getvalue())
