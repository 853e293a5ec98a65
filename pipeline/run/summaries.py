"""The files next to the predictions that a run updates: class statistics and gallery."""

import io
from collections.abc import Collection

import numpy as np
import pyarrow.parquet as pq

from pipeline.classify import GALLERY_CLASSES
from pipeline.commit import CLASS_STATS, Partition
from pipeline.report import GALLERY_FILE, Gallery, read_gallery, write_gallery
from pipeline.run.job import Job
from pipeline.statistics import ClassStatistics, class_table
from pipeline.storage import ABSENT


def has_unwanted(job: Job) -> bool:
    """Whether there is a gallery, and the configuration has since been set to none."""
    uri = f"{job.partition.uri}/{GALLERY_FILE}"
    return not job.config.report.gallery and job.partition.storage.version(uri) != ABSENT


def write_class_table(partition: Partition, statistics: ClassStatistics, topk: int) -> None:
    """Writes `class_stats.parquet`."""
    out = io.BytesIO()
    pq.write_table(class_table(statistics, partition.labels, topk), out, compression="zstd")
    partition.storage.write(f"{partition.uri}/{CLASS_STATS}", out.getvalue())


def update_gallery(job: Job, statistics: ClassStatistics, new: Gallery | None, gone: Collection[str]) -> None:
    """Writes `gallery.parquet` without shards that are gone; it keeps the most frequent classes.

    `new` is what the run has found; None where it has labeled nothing.
    """
    storage, uri, count = job.partition.storage, job.partition.uri, job.config.report.gallery
    if not count:
        storage.delete(f"{uri}/{GALLERY_FILE}")
        return
    frequent = np.argsort(-statistics.count, kind="stable")[:GALLERY_CLASSES].tolist()
    items = (new or Gallery(count, ())).merged(read_gallery(storage, uri), gone, set(frequent))
    write_gallery(storage, uri, items)
