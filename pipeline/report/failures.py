"""The section of the page about failures: samples without a label by cause, and shards that can't be read."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.predictions import read_predictions
from pipeline.report.parts import Section
from pipeline.statistics import ErrorCauses
from pipeline.storage import StorageError
from pipeline.text import pluralize

#: Shards that can't be read, in the page; the manifest has all.
MOST_UNREADABLE = 20
_READERS = 16


def failures(partition: Partition, manifest: pa.Table, max_files: int) -> Section:
    """Why samples of any run have no label, and which shards can't be read.

    Reads the columns `errors` and `error` of the manifest, and the causes from at most `max_files` files.
    """
    failed = manifest["error"].drop_null()
    errors = pc.sum(manifest["errors"]).as_py() or 0
    section = Section("failures", "What failed")
    if not errors and not len(failed):
        section.notes.append("Nothing: every sample of every shard is labeled.")
    if errors:
        bad = pc.sum(pc.greater(manifest["errors"], 0)).as_py()
        section.notes.append(
            f"{pluralize(errors, 'sample')} of {pluralize(bad, 'shard')} could not be labeled"
            f"{_by_cause(section, partition, errors, bad, max_files)}"
        )
        files = f"{partition.uri}/predictions/**/*.parquet".replace("'", "''")
        section.query = f"SELECT shard, key, error FROM '{files}' WHERE error IS NOT NULL ORDER BY ALL"
    if len(failed):
        section.unreadable = failed.slice(0, MOST_UNREADABLE).to_pylist()
        first = f", the first {MOST_UNREADABLE}" if len(failed) > MOST_UNREADABLE else ""
        shards = pluralize(len(failed), "shard")
        section.unreadable_note = f"{shards} could not be read (manifest.parquet lists them{first}):"
    return section


def _by_cause(section: Section, partition: Partition, errors: int, bad: int, max_files: int) -> str:
    """Puts the causes into the section; returns the rest of the sentence that introduces them."""
    try:
        causes, missing = read_causes(partition, max_files)
    except StorageError as error:  # the report of a run is written all the same
        return f". Their causes could not be read: {error}"
    section.causes = causes.to_record()
    note = ", by cause"
    if bad > max_files or causes.count != errors:
        note += f"; the causes are of {causes.count:,}"
    if bad > max_files:
        note += f", in the {pluralize(max_files, 'shard')} with the most errors"
    if missing:
        note += f"; missing prediction files: {missing:,}"
    return f"{note}:"


def read_causes(partition: Partition, max_files: int) -> tuple[ErrorCauses, int]:
    """Reads causes from the `max_files` prediction files with the most errors; raises `StorageError`.

    Returns the causes, and the number of missing files.
    """
    rows = partition.manifest.labeled(["uri", "errors", "output"])
    bad = rows.filter(pc.greater(rows["errors"], 0))
    order = [("errors", "descending"), ("uri", "ascending")]
    worst = bad.take(pc.select_k_unstable(bad, max_files, order)).to_pylist()

    def read(row: Mapping[str, Any]) -> ErrorCauses | None:
        uri = f"{partition.uri}/{row['output']}"
        found = read_predictions(partition.storage, uri, ["key", "error"])
        if found is None:
            return None
        causes = ErrorCauses()
        causes.add(row["uri"], found[1])
        return causes

    total, missing = ErrorCauses(), 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="causes") as pool:
        for causes in pool.map(read, worst):
            if causes is None:
                missing += 1
            else:
                total.merge(causes)
    return total, missing
