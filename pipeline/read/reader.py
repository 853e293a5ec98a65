"""Reads the samples of a shard, one at a time, in a deterministic order."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.read.downloads import read_images
from pipeline.read.limits import Deadline, limit_texts
from pipeline.read.parquet import read_parquet
from pipeline.read.samples import ReadOptions, ReadTimeoutError, Sample, ShardError, UnreadableShardError
from pipeline.read.shards import Shard
from pipeline.read.tables import row_samples, select_rows
from pipeline.read.tar import PartEndError
from pipeline.read.targets import folder_label, hive_label
from pipeline.read.webdataset import read_tar
from pipeline.storage import ObjectChanged, ObjectNotFound, Storage, StorageError, relative_name
from pipeline.text import pluralize


def read_samples(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a shard in shard order; every call yields the same samples.

    Memory holds one sample of a tar, one row of a Parquet file with its pages, or image files of 128 MiB, and
    read buffers of 8 MiB: one for each column, or `concurrent_fetches` + 1 for a tar in object storage.
    docs/reference/input-formats.md describes the samples of each format.

    Raises:
        ShardError: The object is missing, changed, truncated, corrupt or of another format, exceeds a limit,
            or a configured column is missing.
    """
    key, count = "", 0
    is_labeled = options.labels and options.label_from == "folder"
    try:
        deadline = Deadline(options.timeout_s)
        for found in _READERS[shard.format](storage, shard, options, deadline):
            if is_labeled and found.error is None and shard.format == "parquet":
                found.label, found.unmatched = hive_label(shard.object.uri, options.label_column)
            folder = folder_label(found.key) if shard.format == "webdataset" else None
            if is_labeled and found.error is None and folder is not None:
                found.label, found.unmatched = folder, None
            sample = complete_sample(found, options)
            options.check_count(count + 1)
            key, count = sample.key, count + 1
            yield sample
            deadline.restart()
    except Exception as error:
        # Every exception is caught, because the content of one shard must not end the job.
        position = f"after {pluralize(count, 'sample')} (the last key was {key[:200]!r}): " if count else ""
        is_external = isinstance(error, StorageError | ReadTimeoutError | MemoryError)
        transient = is_external and not isinstance(error, ObjectNotFound | ObjectChanged)
        is_damage = count > 0 and not (is_external or shard.members or shard.rows)
        is_damage = is_damage and not isinstance(error, PartEndError)
        keep = is_damage and options.on_damaged_shard == "keep"
        cause, readable = position + _cause(shard, error), count if is_damage else 0
        raise ShardError(shard.uri, cause, transient, keep, readable) from error


def complete_sample(sample: Sample, options: ReadOptions) -> Sample:
    """Returns a sample of a reader with its target, and with texts within their limits."""
    return limit_texts(options.set_target(options.set_carried(sample)))


def _cause(shard: Shard, error: Exception) -> str:
    if isinstance(error, StorageError) and error.uri == shard.object.uri:
        return error.cause
    if isinstance(error, StorageError | UnreadableShardError):
        return str(error)
    return f"damaged, or not in the format {shard.format} ({type(error).__name__}: {error})"


def list_samples(shard: Shard, options: ReadOptions) -> list[Sample]:
    """Returns the samples of a shard whose images are objects of their own, without images, in shard order.

    Labels are set, and targets are not. Of a stored image that is unchanged, this is all that is needed.
    """
    folder = shard.uri.rpartition("/")[0]
    samples = [
        Sample(relative_name(folder, info.uri), None, uri=info.uri, version=info.version)
        for info in shard.members
    ]
    samples = row_samples(shard) if shard.rows else samples
    for sample in samples if options.labels and options.label_from == "folder" else ():
        if sample.error is None:  # an image directly in the input folder has no label
            sample.label = folder_label((sample.uri or "") if shard.rows else sample.key)
    return samples


def select_images(shard: Shard, positions: Sequence[int]) -> Shard:
    """Returns a shard with only these of its images, for reading; see `list_samples`."""
    if shard.rows:
        return select_rows(shard, positions)
    return replace(shard, members=tuple(shard.members[position] for position in positions))


def _read_objects(
    storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline
) -> Iterator[Sample]:
    """Yields the samples of a shard whose images are objects of their own."""
    del deadline  # each request has a time limit
    return read_images(storage, shard, list_samples(shard, options), options)


_READERS = {"webdataset": read_tar, "parquet": read_parquet, "images": _read_objects, "table": _read_objects}
