"""Compares a run of a dataset with the previous run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipeline.commit import Partition
from pipeline.compare.label_sets import LabelSet, compare_label_sets
from pipeline.statistics import ClassStatistics, Comparison


@dataclass(frozen=True)
class RunPair:
    """A run of a dataset, and the last run before it that ended normally.

    Runs between the two were killed or stopped, and the later run completed them. All labels of these runs
    count as labels of the later run. Runs without labels in the partition are ignored.

    Attributes:
        dataset: URI of the dataset. None if the partition has labels of one dataset only.
        previous: id of the earlier run. None for the first run.
        current: ids of the later run and of the runs that it completed. Empty if they labeled nothing.
    """

    partition: Partition
    dataset: str | None
    previous: str | None
    current: Sequence[str]

    @classmethod
    def find(cls, partition: Partition, dataset: str | None, run: str) -> Self:
        """Finds the run before `run`."""
        earlier, current = [each for each in partition.manifest.runs(dataset) if each <= run], list[str]()
        while earlier and (earlier[-1] == run or not _ended_normally(partition, earlier[-1])):
            current.insert(0, earlier.pop())
        return cls(partition, dataset, earlier[-1] if earlier else None, current)

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


def _ended_normally(partition: Partition, run: str) -> bool:
    return partition.record(run).get("status", "complete") in ("complete", "incomplete")
