"""The comparison of two sides: what two models, or two runs, made of it; and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.commit import Manifest, Partition, read_record
from pipeline.compare.comparing import compare
from pipeline.compare.label_set import Side
from pipeline.statistics import ClassStatistics, Comparison
from pipeline.storage import normalised


@dataclass(frozen=True)
class Succession:
    """A run of a dataset, and the one before it, which it is compared with.

    A run that was killed or stopped is one with those after it that did the rest: they are compared with the
    last one before them that ended by itself. Labels of which no run is known are of neither.

    Attributes:
        manifest: of the partition that they labelled for.
        root: URI of the dataset: others may have labels there, too; None takes all for one.
        before: the run before, if there is one.
        now: the runs to compare with it; none where nothing is new since.
    """

    manifest: Manifest
    root: str | None
    before: Sequence[str]
    now: Sequence[str]

    @classmethod
    def of(cls, partition: Partition, dataset: str | None, run: str) -> Succession:
        """Finds them.

        Args:
            partition: that they labelled for.
            dataset: URI of the dataset.
            run: the later run; it may have labelled nothing.

        Raises:
            StorageError: manifest or records can't be read.
        """
        manifest, root = partition.manifest, None if dataset is None else normalised(dataset)
        before, now = [each for each in manifest.runs(root) if each <= run], list[str]()
        while before and (before[-1] == run or not _has_ended(partition, before[-1])):
            now.insert(0, before.pop())
        return cls(manifest, root, before[-1:], now)

    def fold(self) -> tuple[ClassStatistics, list[ClassStatistics]]:
        """The class statistics over all labels of the partition; and of either side.

        Raises:
            StorageError: the manifest can't be read.
        """
        total, *sides = self.manifest.fold_runs(self.root, self.before, self.now)
        return total, sides

    def compared(self, partition: Partition, sides: Sequence[ClassStatistics]) -> Comparison | None:
        """What the later side has labelled, compared with what the earlier one did.

        None where one of the two has no labelled image.

        Args:
            partition: that they labelled for.
            sides: as `fold` makes them.
        """
        if not (self.before and self.now and all(stats.count.any() for stats in sides)):
            return None
        runs = self.before[-1], self.now[-1]
        a, b = (Side(partition, run, stats) for run, stats in zip(runs, sides, strict=True))
        return compare(a, b, with_agreement=False)


def _has_ended(partition: Partition, run: str) -> bool:
    record = read_record(partition.storage, partition.uri, run)
    return record is None or record.get("status") in ("complete", "incomplete")
