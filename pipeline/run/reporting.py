"""The report of a partition written again, also against other labels."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.commit import Partition
from pipeline.compare import LabelSet, compare_run
from pipeline.report import find_record
from pipeline.report import write_report as write_page


def write_report(
    partition: Partition, run: str | None = None, against: Sequence[str] = (), output: str | None = None
) -> str:
    """Writes the report of a partition from what is stored; returns its URI.

    Args:
        partition: what the report is about.
        run: id of the run that the report is about; None for the last run that labeled something.
        against: other labels to compare with: `URI`, `URI@RUN`, `URI@latest` or `URI@previous`.
        output: path or URI of the page; `report.html` in the partition where None.

    Raises:
        StorageError: labels or a record can't be read, or the page can't be written.
    """
    record = find_record(partition, run)
    others = [LabelSet.open(partition.storage, name) for name in against]
    return write_page(partition, record, *compare_run(partition, record, others), output)
