"""Reads the samples of a shard, one at a time, in a deterministic order."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.downloads import read_images
from pipeline.read.limits import Deadline
from pipeline.read.parquet import read_parquet
from pipeline.read.samples import (
    MAX_CARRIED_BYTES,
    MAX_KEY_BYTES,
    ReadOptions,
    ReadTimeoutError,
    Sample,
    ShardError,
    UnreadableShardError,
    describe_excess,
    scalar_array,
)
from pipeline.read.shards import Shard
from pipeline.read.tables import row_samples, select_rows
from pipeline.read.tar import PartEndError
from pipeline.read.targets import folder_label, hive_label
from pipeline.read.webdataset import read_tar
from pipeline.storage import ObjectChanged, ObjectNotFound, Storage, StorageError, relative_name
from pipeline.text import arrow_type, pluralize

_KEPT_KEY_BYTES = 1000  # of a key over the limit
_MAX_MESSAGE = 200


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
    try:
        deadline = Deadline(options.read.timeout_s)
        for found in _READERS[shard.format](storage, shard, options, deadline):
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


def complete_sample(sample: Sample, shard: Shard, options: ReadOptions) -> Sample:
    """Returns a sample of a reader or of `list_samples` with its target, and with texts within limits."""
    key = sample.key.encode(errors="backslashreplace")  # names of local files may have surrogates
    sample.key = key.decode()
    if len(key) > MAX_KEY_BYTES:
        start, digest = key[:_KEPT_KEY_BYTES].decode(errors="ignore"), hashlib.blake2b(key, digest_size=16)
        sample.key = f"{start}...{digest.hexdigest()}"
        sample.fail(sample_error(ErrorCategory.INVALID_KEY, f"the key has more than {MAX_KEY_BYTES} bytes"))
    if options.input.carry:
        _convert_carried(sample, options.input.carry)
    if sample.error is not None:
        return sample
    if options.input.labels and options.input.label_from == "folder":
        folder = folder_label((sample.uri or "") if shard.format == "table" else sample.key)
        if shard.format == "parquet":
            sample.label, sample.unmatched = hive_label(shard.object.uri, options.input.label_column)
        elif folder is not None:  # without a folder, the sample of a tar keeps its own label
            sample.label, sample.unmatched = folder, None
    if sample.unmatched is None:
        sample.target, sample.unmatched = options.targets.find(sample.label, sample.label_names)
    sample.unmatched = sample.unmatched and sample.unmatched[:_MAX_MESSAGE]
    return sample


def _convert_carried(sample: Sample, types: Mapping[str, str | None]) -> None:
    """Converts the carried values to their types; a sample with a value too large or wrong is an error."""
    values = sample.carried or [pa.scalar(None)] * len(types)
    carried, size = list[pa.Scalar](), 0
    for (name, kind), value in zip(types.items(), values, strict=True):
        default = pa.string() if pa.types.is_null(value.type) else value.type
        to = arrow_type(kind) if kind else default
        size += scalar_array([value]).nbytes
        try:
            if size > MAX_CARRIED_BYTES:
                raise ValueError(f"the carried data {describe_excess(size, MAX_CARRIED_BYTES)}")
            carried.append(value if to == value.type else value.cast(to))
        except (ValueError, NotImplementedError) as error:
            carried.append(pa.scalar(None, to))
            if sample.error is None:
                detail = f"{name!r}: {error}; change input.carry"
                sample.fail(sample_error(ErrorCategory.INVALID_CARRIED_VALUE, detail))
    sample.carried = tuple(carried)


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


def _read_objects(
    storage: Storage, shard: Shard, options: ReadOptions, deadline: Deadline
) -> Iterator[Sample]:
    """Yields the samples of a shard whose images are objects of their own."""
    del deadline  # each request has a time limit
    return read_images(storage, shard, list_samples(shard), options)


_READERS = {"webdataset": read_tar, "parquet": read_parquet, "images": _read_objects, "table": _read_objects}
