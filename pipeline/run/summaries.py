"""What lies beside the predictions, for people and programs: class statistics, gallery and report."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.classify import GALLERY_CLASSES
from pipeline.commit import CLASS_STATS, Partition
from pipeline.report import GALLERY_FILE, Gallery, Item, make_report, read_gallery, write_gallery
from pipeline.run.job import Job
from pipeline.statistics import ClassStatistics, Comparison, class_table
from pipeline.storage import ObjectNotFound, StorageError

_logger = logging.getLogger("cvt_label")


def has_unwanted(job: Job) -> bool:
    """Whether there is a gallery, and the configuration has since been set to none."""
    if job.config.report.gallery:
        return False
    try:
        job.partition.storage.stat(f"{job.partition.uri}/{GALLERY_FILE}")
    except ObjectNotFound:
        return False
    return True


def write_class_table(partition: Partition, statistics: ClassStatistics, topk: int) -> None:
    """Writes `class_stats.parquet`."""
    out = io.BytesIO()
    pq.write_table(class_table(statistics, partition.labels, topk), out, compression="zstd")
    partition.storage.write(f"{partition.uri}/{CLASS_STATS}", out.getvalue())


def update_gallery(
    job: Job, statistics: ClassStatistics, new: Gallery | None, gone: Collection[str]
) -> list[Item]:
    """Writes `gallery.parquet` with what a run has found; returns what is in it.

    Args:
        job: whose gallery it is.
        statistics: of all labels; the gallery keeps the most frequent classes.
        new: what the run has found; None where it has labelled nothing.
        gone: shards whose labels it has removed.
    """
    storage, uri, count = job.partition.storage, job.partition.uri, job.config.report.gallery
    if not count:
        storage.delete(f"{uri}/{GALLERY_FILE}")
        return []
    frequent = np.argsort(-statistics.count, kind="stable")[:GALLERY_CLASSES].tolist()
    items = (new or Gallery(count, ())).merged(read_gallery(storage, uri), gone, set(frequent))
    write_gallery(storage, uri, items)
    return items


def write_report(
    stored: Partition,
    record: Mapping[str, Any],
    statistics: ClassStatistics,
    previous: Comparison | None,
    gallery: Collection[Item],
) -> None:
    """Writes `report.html`; one that can't be drawn is logged, for it must not fail a run that is labelled.

    Raises:
        StorageError: the manifest can't be read, or the page not be written.
    """
    try:
        page = make_report(stored, record, statistics, [previous] if previous else [], gallery)
    except StorageError:
        raise
    except Exception:
        _logger.exception("the report could not be drawn")
        return
    stored.storage.write(f"{stored.uri}/report.html", page.encode())
