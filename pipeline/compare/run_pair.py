"""A run and the run before it, for the report and for the gate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipeline.commit import Partition
from pipeline.compare.comparing import compare
from pipeline.compare.label_set import LabelSet
from pipeline.statistics import ClassStatistics, Comparison


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
