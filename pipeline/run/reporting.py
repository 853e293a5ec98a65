"""The report of a partition written again, also against other labels."""

from collections.abc import Sequence

from pipeline.commit import Partition
from pipeline.compare import LabelSet, RunPair, compare
from pipeline.report import write_report as write_page
from pipeline.storage import StorageError


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
    runs = [run] if run is not None else (partition.manifest.runs() or partition.records())[-1:]
    record = partition.record(runs[0]) if runs else None
    if record is None:
        raise StorageError(partition.uri, f"has no record of {'any run' if run is None else f'run {run}'}")
    others = [LabelSet.open(partition.storage, name) for name in against]
    dataset = record.get("config", {}).get("input", {}).get("uri")
    statistics, previous = RunPair.find(partition, dataset, record["run"]).compare()
    labels = LabelSet(partition, statistics=statistics)
    comparisons = [compare(other, labels) for other in others]
    if previous is not None:
        comparisons.insert(0, previous)
    return write_page(partition, record, statistics, comparisons, output)
