"""Operations on a stored partition without a run: find it, rebuild its summaries, write its report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from pipeline.commit import CLASS_STATS, Lease, Partition, new_run_id, rebuilt_rows
from pipeline.compare import LabelSet, RunPair, compare_label_sets
from pipeline.config import WHOLE, Config, InputUris, Share, make_storage
from pipeline.dataflow import sigterm_interrupts
from pipeline.report import render_report
from pipeline.statistics import ClassStatistics, class_table
from pipeline.storage import StorageError, encode_parquet, map_in_threads, normalize_uri

REPORT = "report.html"
#: Number of latest runs whose configuration is compared: runs may name the same model differently.
_RUNS = 10
#: Number of latest runs, also of other datasets, among which the last run of each share is found.
_RUNS_OF_DATASETS = 10_000
#: Seconds after which the lease of a rebuild expires without renewal.
_LEASE_S = 60.0


def find_partition(config: Config) -> Partition:
    """Finds the partition of the latest run whose configuration determines the same labels.

    The model is not loaded. If a checkpoint was replaced under the same path, the partition of the newer
    checkpoint is returned.

    Raises:
        StorageError: there is no such partition, or it can't be read.
    """
    for partition, record in _latest_runs(config, _RUNS):
        if _has_same_labels(config, record):
            return Partition.open(partition.storage, partition.uri)
    cause = (
        "no run has labeled with this model and these options; run `cvt-label label` first, "
        "or give the URI of the partition"
    )
    raise StorageError(config.output.uri, cause)


def find_last_runs(config: Config) -> dict[Share, tuple[str, dict[str, Any]]]:
    """Finds the last run of each part of an input, with any model and in any state.

    Returns:
        By share: the model as `<name>-<fingerprint8>`, and the run record. A run is left out if later runs
        cover its share, alone or together. A share that no run covers has no model and an empty record.

    Raises:
        StorageError: the records can't be read.
    """
    inputs, missing = config.input.inputs, [WHOLE]
    found = dict[Share, tuple[str, dict[str, Any]]]()
    for partition, record in islice(_latest_runs(config), _RUNS_OF_DATASETS):
        if not missing:
            break
        if InputUris.of_record(record) == inputs:
            share = Share.of_record(record)
            if any(share.overlaps(part) for part in missing):
                found.setdefault(share, (partition.model, record))
                missing = [rest for part in missing for rest in part.without(share)]
    return found | {share: ("", {}) for share in missing}


def _latest_runs(config: Config, count: int | None = None) -> Iterator[tuple[Partition, dict[str, Any]]]:
    """Yields the last `count` runs of each partition, the latest first, with their records."""
    storage, runs = make_storage(config.storage), list[tuple[str, Partition]]()
    for uri in storage.list_folders(config.output.uri):
        partition = Partition(storage, uri, ())
        if partition.name.startswith("model="):
            runs += [(run, partition) for run in islice(reversed(partition.records()), count)]
    latest = sorted(runs, key=lambda each: each[0], reverse=True)
    yield from map_in_threads(lambda each: (each[1], each[1].record(each[0])), latest, threads=8)


def _has_same_labels(config: Config, record: Mapping[str, Any]) -> bool:
    """Returns whether a recorded configuration determines the same labels; compares the model by its name."""
    try:
        recorded = Config.model_validate(record.get("config"))
    except ValidationError:
        return False
    path, revision = _model(config)
    other, other_revision = _model(recorded)
    is_same_model = path == other and revision in (other_revision, record.get("model_commit"))
    has_same_names = config.model.labels == recorded.model.labels
    return is_same_model and has_same_names and config.label_settings == recorded.label_settings


def _model(config: Config) -> tuple[str, str]:
    """Returns the path of the model, and the revision, which may be part of a hub id."""
    path, revision = config.model.path, config.model.revision
    if not path.startswith("/") and "://" not in path:
        path, _, after = path.partition("@")
        revision = revision or after
    return path, revision or "main"


def rebuild(partition: Partition) -> None:
    """Regenerates manifest and class statistics from prediction files and run records.

    Raises `StorageError`, `LeaseHeldError` if a run is active, or `LeaseLostError` if a run has taken over.
    """
    lease = Lease(partition.storage, partition.uri, new_run_id(), _LEASE_S)
    with sigterm_interrupts(), lease.held():
        partition.manifest.replace(lambda: rebuilt_rows(partition))
        lease.verify()
        write_class_table(partition, partition.manifest.fold_statistics, partition.topk())
        lease.clean_shutdown = True


def write_class_table(partition: Partition, fold: Callable[[], ClassStatistics], topk: int) -> None:
    """Writes `class_stats.parquet`; folds again if another run has written the file since the fold."""
    partition.storage.update(
        f"{partition.uri}/{CLASS_STATS}",
        lambda _: encode_parquet(class_table(fold(), partition.labels, topk)),
    )


def write_report(
    partition: Partition, run: str | None = None, against: Sequence[str] = (), output: str | None = None
) -> str:
    """Writes the report of a stored partition; returns the URI of the report.

    Args:
        partition: the labels to report on.
        run: id of the run to report on; None for the last run that labeled something.
        against: other labels to compare with: `URI`, `URI@RUN`, `URI@latest` or `URI@previous`.
        output: path or URI of the page; None for `report.html` in the partition.

    Raises:
        StorageError: labels or a run record can't be read, or the page can't be written.
    """
    runs = [run] if run is not None else (partition.manifest.runs() or partition.records())[-1:]
    record = partition.record(runs[0]) if runs else {}
    if not record:
        raise StorageError(partition.uri, f"has no record of {'any run' if run is None else f'run {run}'}")
    others = [LabelSet.open(partition.storage, name) for name in against]
    dataset = InputUris.of_record(record)
    statistics, previous = RunPair.find(partition, dataset, record["run"]).fold_statistics()
    labels = LabelSet(partition, statistics=statistics)
    comparisons = [compare_label_sets(other, labels) for other in others]
    if previous is not None:
        comparisons.insert(0, previous)
    output = f"{partition.uri}/{REPORT}" if output is None else normalize_uri(output)
    partition.storage.write(output, render_report(partition, record, statistics, comparisons))
    return output
