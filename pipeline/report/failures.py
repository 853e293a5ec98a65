"""The section about failures: samples with errors, grouped by cause, and shards that could not be read."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.predictions import read_predictions
from pipeline.report.elements import ReportSection
from pipeline.statistics import ErrorCauses
from pipeline.storage import StorageError
from pipeline.text import pluralize

#: Maximum number of unreadable shards in the page. The manifest lists all.
MAX_UNREADABLE_SHARDS = 20
_READER_THREADS = 16


def failures(partition: Partition, manifest: pa.Table, max_files: int) -> ReportSection:
    """Returns the section about samples with errors and unreadable shards, of all runs.

    Reads the columns `errors` and `error` of the manifest, and at most `max_files` prediction files.
    """
    unreadable = manifest["error"].drop_null()
    errors = pc.sum(manifest["errors"]).as_py() or 0
    section = ReportSection("failures", "Failures")
    if not errors and not len(unreadable):
        section.notes.append("No failures: every sample of every shard is labeled.")
    if errors:
        shards_with_errors = pc.sum(pc.greater(manifest["errors"], 0)).as_py()
        section.notes.append(
            f"{pluralize(errors, 'sample')} in {pluralize(shards_with_errors, 'shard')} could not be labeled"
            f"{_add_causes(section, partition, errors, shards_with_errors, max_files)}"
        )
        files = f"{partition.uri}/predictions/**/*.parquet".replace("'", "''")
        section.query = f"SELECT shard, key, error FROM '{files}' WHERE error IS NOT NULL ORDER BY ALL"
    if len(unreadable):
        section.unreadable_shards = unreadable.slice(0, MAX_UNREADABLE_SHARDS).to_pylist()
        section.unreadable_note = f"{pluralize(len(unreadable), 'shard')} could not be read."
        if len(unreadable) > MAX_UNREADABLE_SHARDS:
            section.unreadable_note += f" The first {MAX_UNREADABLE_SHARDS} are shown."
        section.unreadable_note += " The file manifest.parquet lists all:"
    return section


def _add_causes(
    section: ReportSection, partition: Partition, errors: int, shards_with_errors: int, max_files: int
) -> str:
    """Adds the causes to the section; returns the rest of the sentence that introduces them."""
    try:
        causes, missing_files = read_causes(partition, max_files)
    except StorageError as error:  # must not prevent the report of a run
        return f". The causes could not be read: {error}"
    section.causes = causes.to_record()
    limits = []
    if shards_with_errors > max_files or causes.count != errors:
        limits.append(f"The causes cover {pluralize(causes.count, 'sample')}")
        if shards_with_errors > max_files:
            limits[0] += f" of the {pluralize(max_files, 'shard')} with the most errors"
    if missing_files:
        limits.append(f"{pluralize(missing_files, 'prediction file')} could not be found")
    return ". ".join(["", *limits, "By cause:"])


def read_causes(partition: Partition, max_files: int) -> tuple[ErrorCauses, int]:
    """Reads causes from the `max_files` prediction files with the most errors; raises `StorageError`.

    Returns the causes and the number of missing files.
    """
    rows = partition.manifest.labeled(["uri", "errors", "output"])
    with_errors = rows.filter(pc.greater(rows["errors"], 0))
    order = [("errors", "descending"), ("uri", "ascending")]
    most_errors = with_errors.take(pc.select_k_unstable(with_errors, max_files, order)).to_pylist()

    def read(row: Mapping[str, Any]) -> ErrorCauses | None:
        predictions = read_predictions(
            partition.storage, f"{partition.uri}/{row['output']}", ["key", "error"]
        )
        if predictions is None:
            return None
        causes = ErrorCauses()
        causes.add(row["uri"], predictions[1])
        return causes

    total, missing_files = ErrorCauses(), 0
    with ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="causes") as pool:
        for causes in pool.map(read, most_errors):
            if causes is None:
                missing_files += 1
            else:
                total.merge(causes)
    return total, missing_files
