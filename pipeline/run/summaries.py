"""The end of a run: class statistics, gallery and report."""

import logging
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from pipeline.classify import GALLERY_CLASSES
from pipeline.compare import RunPair
from pipeline.predictions import prediction_path
from pipeline.report import GALLERY_FILE, encode_gallery, read_gallery, render_report
from pipeline.run.gate import check_gate
from pipeline.run.recording import RunContext
from pipeline.run.stored import REPORT, write_class_table
from pipeline.statistics import ClassStatistics, Comparison
from pipeline.storage import ABSENT, StorageError

logger = logging.getLogger("cvt_label")


def summarize(run: RunContext) -> None:
    """Writes class statistics, gallery and report, and checks the limits of the gate.

    Runs of other shares may do the same. A write fails, and is repeated with a new fold, if another run has
    written the file since the fold. So the last write has the labels of all runs that have ended.
    """
    result, partition = run.result, run.result.partition
    runs = RunPair.find(partition, result.job.config.input.inputs, result.run)
    previous: Comparison | None = None

    def fold() -> ClassStatistics:
        nonlocal previous
        result.statistics, previous = runs.fold_statistics()
        return result.statistics

    def page(version: str) -> bytes | None:
        is_first = result.statistics is None
        write_class_table(partition, fold, result.job.topk)
        assert result.statistics is not None
        check_gate(run, runs, previous)
        run.record_counts()
        if is_first:
            _update_gallery(run, result.statistics)
        values = run.record.values | {"ended_at": datetime.now(UTC).isoformat()}
        try:
            return render_report(partition, values, result.statistics, [previous] if previous else [])
        except StorageError:
            raise
        except Exception:  # must not fail a run whose labels are written
            logger.exception("the report could not be written; the labels are complete")
            return None

    partition.storage.update(f"{partition.uri}/{REPORT}", page)


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

    def merged(version: str) -> bytes:
        previous = read_gallery(storage, uri)
        copied = _copied_thumbnails(run, previous)
        return encode_gallery(run.gallery.merge(previous, removed, set(frequent), copied))

    storage.update(f"{uri}/{GALLERY_FILE}", merged)


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
