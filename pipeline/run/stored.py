"""What is done with a stored partition without a run: find it, rebuild its summaries, write its report."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.commit import CLASS_STATS, Lease, Partition, new_run_id, rebuilt_rows
from pipeline.compare import LabelSet, RunPair, compare_label_sets
from pipeline.config import Config, make_storage
from pipeline.dataflow import sigterm_interrupts
from pipeline.report import write_report as write_page
from pipeline.statistics import ClassStatistics, class_table
from pipeline.storage import StorageError

#: Runs of a partition that are looked at, the latest first: they differ in how they name the same model.
_RUNS = 10
#: Seconds after which the lease of a rebuild expires unless it is renewed.
_LEASE_S = 60.0


def find_partition(config: Config) -> Partition:
    """Returns the partition to which the latest run wrote whose configuration determines the same labels.

    The model is not loaded. Where a checkpoint was replaced under the same path, the partition is that of the
    newer checkpoint.

    Raises:
        StorageError: there is none, or it can't be read.
    """
    storage, output, runs = make_storage(config.storage), config.output.uri, dict[str, str]()
    for uri in storage.list_folders(output):
        partition = Partition(storage, uri, ())
        if partition.name.startswith("model="):
            for run in partition.records()[: -_RUNS - 1 : -1]:
                if _has_same_labels(config, partition.record(run) or {}):
                    runs[run] = uri
                    break
    if not runs:
        cause = "nothing is labeled yet with this model and these options (or name the partition by its URI)"
        raise StorageError(output, cause)
    return Partition.open(storage, runs[max(runs)])


def _has_same_labels(config: Config, record: Mapping[str, Any]) -> bool:
    """Whether a run's configuration determines the same labels; the model is compared by its name."""
    try:
        recorded = Config.model_validate(record.get("config"))
    except ValidationError:
        return False
    path, revision = _model(config)
    other, other_revision = _model(recorded)
    return (path, config.model.labels, config.label_settings) == (
        other,
        recorded.model.labels,
        recorded.label_settings,
    ) and revision in (other_revision, record.get("model_commit"))


def _model(config: Config) -> tuple[str, str]:
    """The model's path, and the revision of a hub id, which may be part of the path."""
    path, revision = config.model.path, config.model.revision
    if not path.startswith("/") and "://" not in path:
        path, _, after = path.partition("@")
        revision = revision or after
    return path, revision or "main"


def rebuild(partition: Partition) -> None:
    """Regenerates manifest and class statistics from the prediction files and the records of runs.

    Raises:
        StorageError: the partition can't be read or written.
        LeaseHeldError: a run is at work.
        LeaseLostError: a run has taken over.
    """
    storage, uri = partition.storage, partition.uri
    lease = Lease(storage, uri, new_run_id(), _LEASE_S)
    with sigterm_interrupts(), lease.held():
        partition.manifest.replace(lambda: rebuilt_rows(storage, uri))
        lease.verify()
        write_class_table(partition, partition.manifest.fold_statistics(), partition.topk())
        lease.left_in_order = True


def write_class_table(partition: Partition, statistics: ClassStatistics, topk: int) -> None:
    """Writes `class_stats.parquet`."""
    out = io.BytesIO()
    pq.write_table(class_table(statistics, partition.labels, topk), out, compression="zstd")
    partition.storage.write(f"{partition.uri}/{CLASS_STATS}", out.getvalue())


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
    statistics, previous = RunPair.find(partition, dataset, record["run"]).fold_statistics()
    labels = LabelSet(partition, statistics=statistics)
    comparisons = [compare_label_sets(other, labels) for other in others]
    if previous is not None:
        comparisons.insert(0, previous)
    return write_page(partition, record, statistics, comparisons, output)
