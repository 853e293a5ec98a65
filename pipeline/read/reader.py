"""Reads the samples of a shard, one at a time, in a deterministic order."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.read.downloads import read_images
from pipeline.read.limits import Deadline
from pipeline.read.parquet import read_parquet
from pipeline.read.samples import (
    ReadOptions,
    ReadTimeoutError,
    Sample,
    ShardError,
    UnreadableShardError,
    complete_sample,
)
from pipeline.read.shards import Shard
from pipeline.read.tables import row_samples, select_rows
from pipeline.read.tar import PartEndError
from pipeline.read.webdataset import read_tar
from pipeline.storage import ObjectChanged, ObjectNotFound, Storage, StorageError, relative_name
from pipeline.text import pluralize


def read_samples(storage: Storage, shard: Shard, options: ReadOptions) -> Iterator[Sample]:
    """Yields the samples of a shard in shard order; every call yields the same samples.

    Memory holds one sample of a tar, one row of a Parquet file with its pages, or image files of 128 MiB, and
    read buffers: `concurrent_fetches` + 1 of 8 MiB for a tar in object storage, or 8 MiB for the images of a
    Parquet file and 1 MiB for each other column.
    docs/reference/input-formats.md describes the samples of each format.

    Raises:
        ShardError: The object is missing, changed, truncated, corrupt or of another format, exceeds a limit,
            or a configured column is missing.
    """
    key, count = "", 0
    try:
        deadline = Deadline(options.read.timeout_s)
        for found in _read(storage, shard, options, deadline):
            sample = complete_sample(found, shard, options)
            options.check_count(count + 1)
            key, count = sample.key, count + 1
            yield sample
            deadline.restart()
    except Exception as error:
        # Every exception is caught, because the content of one shard must not end the job.
        position = f"after {pluralize(count, 'sample')} (the last key was {key[:200]!r}): " if count else ""
        is_external = isinstance(error, StorageError | ReadTimeoutError | MemoryError)
        transient = is_external and not isinstance(error, ObjectNotFound | ObjectChanged)
        is_file = shard.format in ("webdataset", "parquet")
        is_damage = is_file and count > 0 and not (is_external or isinstance(error, PartEndError))
        keep = is_damage and options.input.on_damaged_shard == "keep"
        cause, readable = position + _cause(shard, error), count if is_damage else 0
        raise ShardError(shard.uri, cause, transient, keep, readable) from error


def _read(storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline) -> Iterator[Sample]:
    if shard.format == "webdataset":
        return read_tar(storage, shard, options, deadline)
    if shard.format == "parquet":
        return read_parquet(storage, shard, options, deadline)
    return read_images(storage, shard, list_samples(shard), options)  # each request has a time limit


def _cause(shard: Shard, error: Exception) -> str:
    if isinstance(error, StorageError) and error.uri == shard.object.uri:
        return error.cause
    if isinstance(error, StorageError | UnreadableShardError):
        return str(error)
    return f"damaged, or not in the format {shard.format} ({type(error).__name__}: {error})"


def list_samples(shard: Shard) -> list[Sample]:
    """Returns the samples of a shard whose images are objects of their own, without images, in shard order.

    With `complete_sample`, this is all that is needed of a stored image that is unchanged.
    """
    if shard.rows:
        return row_samples(shard)
    folder = shard.uri.rpartition("/")[0]
    return [
        Sample(relative_name(folder, info.uri), None, uri=info.uri, version=info.version)
        for info in shard.members
    ]


def select_images(shard: Shard, positions: Sequence[int]) -> Shard:
    """Returns a shard with only these of its images, for reading; see `list_samples`."""
    if shard.rows:
        return select_rows(shard, positions)
    return replace(shard, members=tuple(shard.members[position] for position in positions))
