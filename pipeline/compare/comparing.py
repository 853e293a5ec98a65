"""The comparison of two sides: what two models, or two runs, made of it; and its table."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.compare.agreement import measure_agreement
from pipeline.compare.label_set import Side
from pipeline.statistics import Classes, Comparison, Drift
from pipeline.storage import StorageError


def compare(
    a: Side, b: Side, with_agreement: bool = True, on_progress: Callable[[int], None] = lambda shards: None
) -> Comparison:
    """Compares two sides.

    Two runs of one partition share no sample, since a shard has one set of labels there: of these there is
    drift alone.

    Args:
        a: one side.
        b: the other.
        with_agreement: also read every label, to compare them sample by sample.
        on_progress: told how many shards' labels were looked at.

    Raises:
        StorageError: a side can't be read, or holds no labelled image.
    """
    classes = Classes.matched(a.partition.labels, b.partition.labels)
    for side in (a, b):
        if not side.counts[0].any():
            raise StorageError(side.name, "nothing to compare: no image is labelled there")
    drift = Drift.between(classes, a.counts, b.counts)
    agreement = None
    if with_agreement and a.partition.uri != b.partition.uri:
        agreement = measure_agreement(classes, a, b, on_progress)
    return Comparison(a.id, b.id, drift, agreement)
