"""The end of a run: class statistics, gallery and report."""

import logging
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from pipeline.classify import GALLERY_CLASSES
from pipeline.predictions import prediction_path
from pipeline.report import GALLERY_FILE, read_gallery, write_gallery, write_report
from pipeline.run.gate import check_gate, find_run_pair
from pipeline.run.recording import RunContext
from pipeline.run.stored import write_class_table
from pipeline.statistics import ClassStatistics
from pipeline.storage import ABSENT, StorageError

logger = logging.getLogger("cvt_label")


def summarize(run: RunContext) -> None:
    """Writes class statistics, gallery and report, and checks the limits of the gate."""
    runs, partition = find_run_pair(run), run.result.partition
    statistics, previous = runs.fold_statistics()
    run.result.statistics = statistics
    write_class_table(partition, statistics, run.result.job.topk)
    check_gate(run, runs, previous)
    run.record_counts()
    _update_gallery(run, statistics)
    values = run.record.values | {"ended_at": datetime.now(UTC).isoformat()}
    try:
        write_report(partition, values, statistics, [previous] if previous else [])
    except StorageError:
        raise
    except Exception:  # must not fail a run whose labels are written
        logger.exception("the report could not be written; the labels are complete")


def has_unwanted_gallery(run: RunContext) -> bool:
    """Returns whether the partition has a gallery although `report.gallery` is 0."""
    uri = f"{run.result.partition.uri}/{GALLERY_FILE}"
    return not run.result.job.config.report.gallery and run.result.job.storage.version(uri) != ABSENT


def _update_gallery(run: RunContext, statistics: ClassStatistics) -> None:
    """Writes `gallery.parquet` without removed shards, for the most frequent classes."""
    storage, uri = run.result.job.storage, run.result.partition.uri
    if not run.result.job.config.report.gallery:
        storage.delete(f"{uri}/{GALLERY_FILE}")
        return
    removed = {*run.record.values["removed"], *run.result.rolled_back}
    frequent = np.argsort(-statistics.count, kind="stable")[:GALLERY_CLASSES].tolist()
    previous = read_gallery(storage, uri)
    copied = _copied_thumbnails(run, previous)
    write_gallery(storage, uri, run.gallery.merge(previous, removed, set(frequent), copied))


def _copied_thumbnails(run: RunContext, gallery: pa.Table) -> pa.Table:
    """Returns the rows of a gallery whose prediction row was copied, with their new shard and index."""
    folder = f"{run.result.partition.uri}/predictions"
    keys = gallery.select(["shard", "index"]).to_pylist()  # without the thumbnails
    numbers = {
        (f"{folder}/{prediction_path(key['shard'])}", key["index"]): number for number, key in enumerate(keys)
    }
    found = [
        gallery.slice(numbers[file, row], 1).to_pylist()[0] | {"shard": shard, "index": position}
        for shard, copied in run.result.plan.copied.items()
        for (file, _), pairs in copied.rows.items()
        for position, row in pairs
        if (file, row) in numbers
    ]
    return pa.Table.from_pylist(found, gallery.schema)
